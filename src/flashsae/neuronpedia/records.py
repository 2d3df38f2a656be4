"""What Neuronpedia reads, field by field: `flashsae.files.schema.parse` checks a file against it.

Source: the client neuronpedia 1.2.1, np_feature.py, np_activation.py and requests/feature_request.py; the rows of its
database as its own exports write them, and as apps/webapp/lib/db/import.ts reads them.
"""

# ruff: noqa: N815 - the names are theirs
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from flashsae.files.schema import Count, Finite, Fraction, Pattern, Size

MOST_FEATURES = 128
"""In a request to feature/upload-batch."""

_NO_NUL = "[^\0]*"
Text = Annotated[str, Pattern(_NO_NUL, "text without NUL, which a database cannot hold")]
Id = Annotated[str, Pattern(r"[A-Za-z0-9][A-Za-z0-9._-]*", "letters, digits, and any of . _ - between them")]
Source = Annotated[str, Pattern(r"\d+-[A-Za-z0-9][A-Za-z0-9._-]*", "the number of a layer, -, and the name of a set")]
Moment = Annotated[str, Pattern(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", "a moment in ISO 8601")]


@dataclass(frozen=True)
class TokenLogit:
    """What a latent adds to the logit of a token, by its decoder row."""

    token: Text
    value: Finite


@dataclass(frozen=True)
class UploadActivation:
    """A text and the values of a latent in it.

    Args:
        tokens: text of each.
        values: of the latent at each.
        quantileMin, quantileMax: the bin of the histogram that its largest value lies in.
        quantileFraction: fraction of all tokens read whose values lie in it.
    """

    tokens: list[Text]
    values: list[Finite]
    quantileMin: Finite | None
    quantileMax: Finite | None
    quantileFraction: Fraction | None


@dataclass(frozen=True)
class UploadExplanation:
    """What somebody takes the meaning of a latent for."""

    text: Text
    methodName: Text | None = None
    modelName: Text | None = None


@dataclass(frozen=True)
class UploadFeature:
    """A latent.

    Args:
        index: in [0, d_sae).
        density: fraction of the tokens on which it is active.
        activations: by descending value.
        explanations: none of ours.
        topLogits, bottomLogits: the tokens that it raises most and lowers most; none where nobody asked.
    """

    index: Count
    density: Fraction
    activations: list[UploadActivation]
    explanations: list[UploadExplanation]
    topLogits: list[TokenLogit]
    bottomLogits: list[TokenLogit]


@dataclass(frozen=True)
class UploadBatch:
    """The body of a request to feature/upload-batch, at most MOST_FEATURES latents."""

    modelId: Id
    source: Source
    features: list[UploadFeature]


@dataclass(frozen=True)
class ReleaseRow:
    """release.jsonl: what belongs together, such as the SAEs of a paper."""

    name: Id
    description: Text
    creatorName: Text
    creatorId: Text
    createdAt: Moment
    descriptionShort: Text
    creatorNameShort: Text
    defaultSourceSetName: Id
    visibility: str = "PUBLIC"
    isNewUi: bool = False
    featured: bool = False
    urls: list[Text] = field(default_factory=list)


@dataclass(frozen=True)
class ModelRow:
    """model.jsonl; passed over where Neuronpedia knows the model."""

    id: Id
    instruct: bool
    creatorId: Text
    layers: Size
    createdAt: Moment
    updatedAt: Moment
    displayNameShort: Text
    displayName: Text
    defaultSourceSetName: Id
    visibility: str = "PUBLIC"
    inferenceEnabled: bool = False
    neuronsPerLayer: Count = 0
    owner: Text = ""


@dataclass(frozen=True)
class SourceSetRow:
    """sourceset.jsonl: SAEs of the layers of a model that belong together."""

    modelId: Id
    name: Id
    creatorId: Text
    releaseName: Id
    createdAt: Moment
    description: Text
    creatorName: Text
    hasDashboards: bool = True
    visibility: str = "PUBLIC"
    type: Text = ""
    urls: list[Text] = field(default_factory=list)
    defaultRange: Count = 1
    defaultShowBreaks: bool = True
    showDfa: bool = False
    showCorrelated: bool = False
    showHeadAttribution: bool = False
    showUmap: bool = False


@dataclass(frozen=True)
class SourceRow:
    """source.jsonl: an SAE."""

    id: Source
    modelId: Id
    setName: Id
    creatorId: Text
    createdAt: Moment
    dataset: Text | None = None
    num_tokens_in_prompt: Size | None = None
    notes: Text | None = None
    hasDashboards: bool = True
    inferenceEnabled: bool = False
    visibility: str = "PUBLIC"
    hasUmap: bool = False
    hasUmapLogSparsity: bool = False
    hasUmapClusters: bool = False


@dataclass(frozen=True)
class FeatureRow:
    """A line of features/batch-N.jsonl.gz: a latent; an index is text in this database."""

    modelId: Id
    layer: Source
    index: Annotated[str, Pattern(r"\d+", "a number")]
    sourceSetName: Id
    creatorId: Text
    createdAt: Moment
    maxActApprox: Finite
    frac_nonzero: Fraction
    freq_hist_data_bar_heights: list[Finite]
    freq_hist_data_bar_values: list[Finite]
    pos_str: list[Text]
    pos_values: list[Finite]
    neg_str: list[Text]
    neg_values: list[Finite]
    hasVector: bool = False


@dataclass(frozen=True)
class ActivationRow:
    """A line of activations/batch-N.jsonl.gz: a text and the values of a latent in it."""

    id: Annotated[str, Pattern(r"c[0-9a-z]{24}", "c and 24 letters or digits")]
    modelId: Id
    layer: Source
    index: Annotated[str, Pattern(r"\d+", "a number")]
    tokens: list[Text]
    values: list[Finite]
    maxValue: Finite
    maxValueTokenIndex: Count
    minValue: Finite
    creatorId: Text
    createdAt: Moment
    binMin: Finite | None
    binMax: Finite | None
    binContains: Fraction | None
    qualifyingTokenIndex: Count
