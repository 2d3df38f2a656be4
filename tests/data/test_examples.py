"""Models that read no text: what becomes a row, and what is refused; vectors are those that the model itself gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import flashsae
from flashsae.data.cache_writer import write_cache
from flashsae.data.inputs import InputSource
from flashsae.data.sources import Chunk
from flashsae.errors import ConfigError, DataError, DtypeError, FlashSAEError, ShapeError

TRAINING: dict[str, Any] = {"d_sae": 32, "k": 4, "batch_tokens": 64, "shuffle_tokens": 256, "progress": False}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_batches(n: int = 6, size: int = 3, **more: Tensor) -> Callable[[], Iterator[dict[str, Tensor]]]:
    return lambda: ({"pixel_values": noise(size, 3, 8, 8, seed=i), **more} for i in range(n))


def whole(source: InputSource, split: Any = None, cursor: Any = None) -> tuple[Chunk, list[Any]]:
    chunks, cursors = zip(*source.chunks(split, cursor))
    acts = {site: torch.cat([chunk.acts[site] for chunk in chunks]) for site in chunks[0].acts}
    group, position = (torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("group", "position"))
    return Chunk(acts, group, None, position), list(cursors)


@pytest.fixture(scope="module")
def vit(tiny: Any) -> nn.Module:
    made: nn.Module = tiny.MORE_FAMILIES["vit"]()
    return made


def test_rows_are_positions_of_examples(vit: nn.Module) -> None:
    hookpoint = next(name for name, _ in vit.named_modules() if name.endswith(".0"))
    chunk, _ = whole(InputSource(vit, image_batches(), hookpoint, skip_first=1))
    with torch.no_grad():
        hidden = [vit(**batch, output_hidden_states=True).hidden_states[1] for batch in image_batches()()]
    expected = torch.cat(hidden)[:, 1:]
    torch.testing.assert_close(chunk.acts[hookpoint].view_as(expected), expected, rtol=0, atol=1e-5)
    assert chunk.group.tolist() == [example for example in range(18) for _ in range(4)]
    assert chunk.position is not None
    assert chunk.position.tolist() == [1, 2, 3, 4] * 18


def test_a_tower_of_clip_reads_images_alone(tiny: Any) -> None:
    clip = tiny.MORE_FAMILIES["clip"]()
    source = InputSource(clip, image_batches(), "vision_model.encoder.layers.0, vision_model.encoder.layers.0.mlp:in")
    assert list(source.widths.values()) == [16, 16]
    assert source.n_positions == 5


class Shapes(nn.Module):
    """Gives an image in every arrangement, as plain modules and timm's do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 2, stride=2)
        self.last = nn.Linear(7, 7)
        self.length_first = nn.Identity()
        self.pooled = nn.Identity()
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.conv(x).movedim(1, -1))
        x = self.length_first(x.flatten(1, 2).transpose(0, 1)).transpose(0, 1)
        return self.head(self.pooled(x.mean(1)))


@pytest.mark.parametrize("size", [(8, 8), (14, 6)])
def test_every_arrangement_becomes_vectors(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = Shapes()
    images = noise(5, 3, *size)
    places = size[0] * size[1] // 4
    source = InputSource(model, [images[:3], images[3:]], "conv, last, length_first")
    chunk, _ = whole(source)
    expected = model.last(model.conv(images).movedim(1, -1)).flatten(0, 2)
    torch.testing.assert_close(chunk.acts["last"], expected.detach())
    assert torch.equal(chunk.acts["length_first"], chunk.acts["last"])
    assert source.positions["conv"].grid == (size[0] // 2, size[1] // 2)
    pooled, _ = whole(InputSource(model, [images], "pooled"))
    torch.testing.assert_close(pooled.acts["pooled"], expected.detach().view(5, places, 7).mean(1))
    assert pooled.group.tolist() == [0, 1, 2, 3, 4]


def test_an_arrangement_that_cannot_be_told_is_refused() -> None:
    model = nn.Sequential(nn.Identity(), nn.Conv2d(4, 6, 1))
    with pytest.raises(ConfigError, match=r"cannot be told from \[2, 4, 6, 9\]; choose the module around it"):
        InputSource(model, [noise(2, 4, 6, 9)], "0")
    assert InputSource(model, [noise(2, 4, 6, 9)], "1:in").widths == {"1:in": 4}
    with pytest.raises(ConfigError, match=r"got \[48, 9\].* for 2 examples; choose a layer"):
        InputSource(nn.Sequential(nn.Flatten(0, 2), nn.Linear(9, 9)), [noise(2, 4, 6, 9)], "0")


@pytest.mark.parametrize("family", ["ResNet", "ConvNext", "Swin"])
def test_convolutions_and_windows(family: str) -> None:
    import transformers

    torch.manual_seed(0)
    settings: dict[str, dict[str, Any]] = {
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"},
        "ConvNext": {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
        "Swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32},
    }
    config = getattr(transformers, f"{family}Config")(**settings[family])
    model = getattr(transformers, f"{family}Model")(config)
    stage = next(n for n, m in model.named_modules() if n.endswith(("stages.1", "layers.1")) and list(m.children()))
    source = InputSource(model, [{"pixel_values": noise(2, 3, 32, 32)}], stage)
    assert source.widths == {stage: 16 if family == "Swin" else 12}
    assert source.n_positions == 16


@pytest.mark.parametrize("family", ["Wav2Vec2", "Hubert"])
def test_sounds_are_masked_where_the_model_shortens_them(family: str) -> None:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.9,
    }  # fmt: skip
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**sizes)).train()
    mask = torch.ones(3, 400, dtype=torch.int64)
    mask[1, 200:] = 0
    batch = {"input_values": noise(3, 400), "attention_mask": mask}
    chunk, _ = whole(InputSource(model, [batch], "encoder.layers.0"))
    lengths = model._get_feat_extract_output_lengths(mask.sum(1)).tolist()
    assert chunk.group.bincount().tolist() == lengths
    assert lengths[1] < lengths[0]
    assert model.training
    again, _ = whole(InputSource(model, [batch], "encoder.layers.0"))
    assert torch.equal(chunk.acts["encoder.layers.0"], again.acts["encoder.layers.0"])  # nothing masked at random
    convolved = InputSource(model, [{"input_values": noise(3, 400)}], "feature_extractor.conv_layers.0")
    assert convolved.widths == {"feature_extractor.conv_layers.0": 8}


def test_the_encoder_of_two_halves_reads_sounds_alone(tiny: Any) -> None:
    whisper = tiny.MORE_FAMILIES["whisper"]()
    source = InputSource(whisper, [{"input_features": noise(2, 80, 3000)}], "encoder.layers.0")
    assert (source.widths, source.n_positions) == ({"encoder.layers.0": 16}, 1500)


def test_keep_decides_and_the_model_does_not_see_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    keep = torch.tensor([[True, False, True], [False, False, True]])
    chunk, _ = whole(InputSource(model, [{"input": noise(2, 3, 4), "keep": keep}], "0"))
    assert torch.equal(chunk.acts["0"], model(noise(2, 3, 4))[keep].detach())
    with pytest.raises(ShapeError, match=r"keep: expected \[2, 3\], got \[2, 2\]"):
        whole(InputSource(model, [{"input": noise(2, 3, 4), "keep": keep[:, :2]}], "0"))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.after = nn.Linear(4, 4), nn.Linear(4, 4)
        self.seen: list[int] = []
        self.finished = 0

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.seen += x[:, 0, 0].tolist()
        x = self.inner(x)
        self.finished += 1
        return x


def numbered(n: int = 30, size: int = 4) -> list[dict[str, Tensor]]:
    numbers = torch.arange(n, dtype=torch.float32)
    return [{"x": each[:, None, None].expand(-1, 3, 4)} for each in numbers.split(size)]


def test_held_out_examples_do_not_reach_the_model_and_it_stops_early() -> None:
    model = Counts()
    source = InputSource(model, numbered(), "inner", held_out=0.3)
    parts = {}
    for split in ("train", "held_out"):
        model.seen.clear()
        chunk, _ = whole(source, split)
        parts[split] = set(chunk.group.tolist())
        assert {int(number) for number in model.seen} == parts[split]
    assert min(map(len, parts.values())) > 0
    assert parts["train"] | parts["held_out"] == set(range(30))
    assert not parts["train"] & parts["held_out"]
    assert model.finished == 0


@pytest.mark.parametrize("is_function", [False, True])
def test_it_goes_on_at_every_cursor_with_the_same_rows(is_function: bool) -> None:
    starts = []

    def batches(start: int = 0) -> Iterator[dict[str, Tensor]]:
        starts.append(start)
        yield from numbered()[start:]

    inputs: Any = batches if is_function else DataLoader(torch.stack([noise(3, 4, seed=i) for i in range(30)]), 4)
    model = Counts()
    source = InputSource(model, inputs, "inner", held_out=0.3, max_norm_ratio=1.5)
    every, cursors = whole(source, "train")
    done = 0
    for cursor in cursors[:-1]:
        done = cursor["rows"]
        rest, _ = whole(source, "train", cursor)
        assert torch.equal(rest.acts["inner"], every.acts["inner"][done:])
        assert torch.equal(rest.group, every.group[done:])
    assert done + cursors[-1]["dropped"] > 0
    assert not is_function or max(starts) > 0
    limited = torch.cat([chunk.group for chunk, _ in source.chunks(None, max_tokens=10)])
    assert len(limited) == 10


def test_half_precision_and_wrapped_models_take_float32_inputs() -> None:
    model = nn.DataParallel(nn.Sequential(nn.Linear(4, 4), nn.ReLU())).bfloat16()
    source = InputSource(model, [noise(3, 4)], "1")
    assert source.dtype == torch.bfloat16


def test_an_sae_is_trained_and_resumed_on_inputs(vit: nn.Module, tmp_path: Any) -> None:
    hookpoint = next(name for name, _ in vit.named_modules() if name.endswith(".0"))
    reading = {"inputs": image_batches(20, 8), "hookpoint": hookpoint, "held_out": 0.3, "skip_first": 1}
    acts = flashsae.activations(vit, **reading)
    sae = flashsae.fit(acts, tokens=64 * 20, run=tmp_path / "run", **TRAINING)
    assert 0 < flashsae.evaluate(sae, acts.held_out).fvu < 1
    again = flashsae.fit(
        flashsae.activations(vit, **reading), tokens=64 * 20, run=tmp_path / "run", resume=True, **TRAINING
    )
    direct = flashsae.train(vit, tokens=64 * 20, **reading, **TRAINING)
    assert torch.equal(sae.W_dec, again.W_dec)
    assert torch.equal(sae.W_dec, direct.W_dec)
    other = flashsae.activations(vit, **{**reading, "inputs": lambda: ({"pixel_values": noise(8, 3, 8, 8, seed=9)},)})
    with pytest.raises(FlashSAEError, match="inputs"):
        flashsae.fit(other, tokens=64 * 20, run=tmp_path / "run", resume=True, **TRAINING)


def test_a_protein_model_reads_text(tmp_path: Any) -> None:
    from transformers import EsmConfig, EsmModel, EsmTokenizer

    letters = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(letters), "utf-8")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = EsmModel(EsmConfig(vocab_size=len(letters), pad_token_id=1, mask_token_id=32, **sizes))
    sequences = ["MKTAYIAKQR" * (i % 3 + 1) for i in range(12)]
    tokenizer = EsmTokenizer(str(tmp_path / "vocab.txt"))
    acts = flashsae.activations(model, tokenizer, sequences, hookpoint="encoder.layer.0", context_length=64)
    assert sum(len(batch["encoder.layer.0"]) for batch in acts) == sum(map(len, sequences))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((b for b in numbered()), ConfigError, "Give the function: inputs=batches, not batches"),
        (DataLoader(noise(8, 3, 4), 4, shuffle=True), ConfigError, "Give shuffle=False"),
        (noise(2, 3, 4), DtypeError, r"Put one batch into a list: inputs=\[batch\]"),
        ([], DataError, "they are empty"),
        ([{"x": noise(0, 3, 4)}], DataError, "at least one of the examples"),
        ([(noise(2, 3, 4), 1)], DtypeError, r"got a tuple. Name what the model takes: inputs=\[\{'x': x\}"),
        ([{"x": noise(2, 3, 4), "path": ["a", "b"]}], DtypeError, "path: expected a tensor, got list"),
        ([{"x": noise(2, 3, 4), "mask": noise(3)}], ShapeError, "2 in x, 3 in mask"),
        ([{"x": noise(2, 3, 4), "y": noise(2)}], ConfigError, "cannot read x, y .TypeError: .*Give what its forward"),
        ([{"x": noise(2, 3, 5)}], ConfigError, "cannot read x .RuntimeError"),
        ([{"x": noise(2, 3, 4).log()}], ConfigError, "NaN or Inf at inner"),
        (numbered, DtypeError, "keep: expected a tensor"),
    ],
)
def test_what_is_refused(inputs: Any, error: type[Exception], message: str) -> None:
    if inputs is numbered:
        inputs = [{"x": noise(2, 3, 4), "keep": noise(2, 3)}]
    with pytest.raises(error, match=message):
        InputSource(Counts(), inputs, "inner")


def test_what_does_not_run_changes_or_has_no_mask_is_refused() -> None:
    with pytest.raises(ConfigError, match="after did not run when the model read the inputs x"):
        InputSource(Counts(), numbered(), "after")
    seeds = iter(range(9))
    with pytest.raises(DataError, match="the first batch is another one than when it was read before"):
        InputSource(Counts(), lambda: [noise(2, 3, 4, seed=next(seeds))], "inner")
    mask = torch.tensor([[1, 1, 0, 0]] * 2)
    with pytest.raises(ShapeError, match=r"attention_mask is \[2, 4\], and \[2, 3\] positions"):
        whole(InputSource(Counts(), [{"x": noise(2, 3, 4), "attention_mask": mask}], "inner"))
    later = [noise(2, 3, 4), noise(2, 3, 3, 4)]
    with pytest.raises((ShapeError, ConfigError), match="arranged otherwise"):
        whole(InputSource(Counts(), later, "inner"))
    bad = [noise(2, 3, 4), noise(2, 3, 4).log()]
    with pytest.raises(DataError, match=r"NaN or Inf at inner for the examples \[2, 3\]|NaN or Inf at inner"):
        whole(InputSource(Counts(), bad, "inner"))


def test_they_are_not_cached(tmp_path: Any) -> None:
    source: Any = InputSource(Counts(), numbered(), "inner")
    with pytest.raises(ConfigError, match=r"source: expected a model that reads text .*, got InputSource"):
        write_cache(tmp_path / "acts", source)
    assert not (tmp_path / "acts").exists()


def test_settings_of_text_mean_nothing_beside_inputs() -> None:
    for more, message in (
        ({"context_length": 3}, "context_length: expected nothing beside inputs"),
        ({"tokenizer": 1}, "tokenizer: expected nothing beside inputs"),
        ({"inputs": None}, "texts: expected what the model reads"),
        ({"skip_first": 3}, "skip_first: expected fewer than the 3 positions"),
        ({"skip_first": -1}, "skip_first: expected at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            flashsae.activations(Counts(), **{"inputs": numbered(), "hookpoint": "inner", **more})
    with pytest.raises(ConfigError, match="model: expected a module beside inputs"):
        flashsae.activations("minilm", inputs=numbered(), hookpoint="inner")
