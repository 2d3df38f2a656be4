"""The commands that give SAEs to others, or take them: what each takes, and which function does it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console

from flashsae.settings.kinds import expand


def convert(
    src: str,
    dst: Path,
    *,
    to: str,
    format: str | None = None,
    lossy: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
) -> None:
    """Write an SAE of one library for another, or all of a run or a folder of several.

    Args:
        src: Folder or file of an SAE, of a run, or of several SAEs; or hf://OWNER/NAME/FOLDER on the hub.
        dst: Folder that is written; must not exist.
        to: Format that is written: flashsae, saelens, sparsify, dictionary_learning, circuit_tracer or llamascopium.
        format: Format of the source. Default: recognised by what is there.
        lossy: Give up what the other format cannot hold, and say what it was, instead of refusing.
        overwrite: Replace the folder, if it holds nothing that is not written again.
        revision: Branch, tag or commit on the hub. Default: its main branch.
    """
    from flashsae.cli.converting import Conversion
    from flashsae.cli.converting import convert as write_as

    write_as(Conversion(src, dst, to, format, lossy, overwrite, revision), Console())


def push(
    run: Path,
    repo: str | None = None,
    *,
    private: bool = False,
    revision: str | None = None,
    format: tuple[str, ...] | None = None,
    path_in_repo: str | None = None,
    license: str | None = None,
    message: str | None = None,
    to_folder: Path | None = None,
) -> None:
    """Push the SAEs of a run to the Hugging Face hub, with a model card that is made of the run, as one commit.

    Needs a token that may write: of hf auth login, or HF_TOKEN. flashsae.load("hf://USER/NAME") loads it again, and
    the card says how others do. Paths of this machine are shortened, and what looks like a secret is refused.

    Args:
        run: Folder of a run that has ended, of one SAE or several, or of an SAE.
        repo: USER/NAME on the hub; made where it is not there yet.
        private: Make a repository that only its owner sees; one that is public is refused.
        revision: Branch to push to; made where it is not there yet. Default: the main one.
        format: Of other libraries, to push beside ours: saelens, sparsify, dictionary_learning ...; none of them with
            flashsae. Default: saelens, where it holds all of the SAE.
        path_in_repo: Folder in the repository, for one that holds several runs. Default: its root.
        license: For the card, as the hub calls it, such as mit or apache-2.0. Default: the card names none.
        message: Of the commit. Default: says what the SAE is of.
        to_folder: Write what would be pushed into this folder, which must not exist, and push nothing.
    """
    from flashsae.publish.command import Pushing, push_run

    asked = Pushing(repo, private, revision, format, path_in_repo, license, message, to_folder)
    push_run(expand(run, "run"), asked, Console())


def neuronpedia(
    run: Path,
    out: Path,
    *,
    set_name: Annotated[str, Parameter(name="--set")],
    model_id: str | None = None,
    layer: Annotated[int, Parameter(validator=Number(gte=0))] | None = None,
    kind: Literal["upload", "bulk"] = "upload",
    logits: bool = False,
    creator: str = "FlashSAE",
    creator_id: str | None = None,
) -> None:
    """Write the latents that the report of a run shows as Neuronpedia reads them.

    Args:
        run: Folder of a finished run.
        out: Folder to write to: of --kind upload new, of --kind bulk the one that holds MODEL/LAYER-SET.
        set_name: What Neuronpedia is to call SAEs of several layers that this one belongs to, such as res-16k-mine.
        model_id: What it calls the model, such as gpt2-small. Default: by the name of the model.
        layer: Number of the block. Default: that in the hookpoint.
        kind: upload: bodies of requests of its client, 128 latents each; bulk: the folder that it imports.
        logits: Load the model, and tell the tokens that each latent raises and lowers most.
        creator: Who made the SAE; of --kind bulk.
        creator_id: User of Neuronpedia whose it is; of --kind bulk. Default: that of its own tools.
    """
    from flashsae.neuronpedia import Asked, export

    given = {} if creator_id is None else {"creator_id": creator_id}
    asked = Asked(set_name, model_id, layer, kind, logits, creator, **given)
    folder = export(run, out, asked)
    Console().print(str(folder.resolve()), highlight=False, soft_wrap=True)


COMMANDS: dict[Callable[..., Any], tuple[str, ...]] = {
    convert: (
        "flashsae convert runs/mine for-sae-lens --to saelens",
        "flashsae convert hf://me/saes/h.6 mine --to flashsae",
    ),
    push: (
        "flashsae push runs/gpt2-h.6 me/gpt2-saes --to-folder look   pushed nowhere",
        "flashsae push runs/gpt2-h.6 me/gpt2-saes --license mit",
        "flashsae push runs/gpt2-h.6 me/saes --path-in-repo h.6 --format sparsify",
        "flashsae push runs/gpt2-h.6 me/gpt2-saes --private --revision second-try",
    ),
    neuronpedia: (
        "flashsae neuronpedia runs/gpt2-h.6 upload --set res-16k-mine",
        "flashsae neuronpedia runs/h.6 all --set res-16k-mine --kind bulk --logits",
    ),
}
"""With lines of how each is used."""
