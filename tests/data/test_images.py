"""Folders of images through vision models: rows are patches, runs and caches are made and resumed, images are drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

import flashsae
from flashsae.cli import main
from flashsae.data.cache import ActivationCache
from flashsae.data.cache_merge import merge_caches
from flashsae.data.cache_writer import write_cache
from flashsae.data.existing import open_configured_text
from flashsae.data.image_files import ImageFolder
from flashsae.data.images import ImageSource, Pictures
from flashsae.data.open import cache_activations
from flashsae.errors import ConfigError, DataError
from flashsae.report.snippet_file import read_snippets
from flashsae.run.execute import draw_report
from flashsae.settings.reading import ReadingConfig
from helpers.tiny_vision import write_model, write_photos


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    write_model(folder / "vit")
    write_photos(folder / "photos")
    return folder


def config_of(place: Path, **settings: Any) -> ReadingConfig:
    settings = {"hookpoint": "layers.1", "forward_tokens": 32, "context_length": None, **settings}
    return ReadingConfig(str(place / "vit"), str(place / "photos"), **settings)


def source_of(place: Path, **settings: Any) -> ImageSource:
    config = ReadingConfig(
        str(place / "vit"), str(place / "photos"), **{"hookpoint": _layer(place), "forward_tokens": 256, **settings}
    ).filled()
    images = open_configured_text(config)
    assert isinstance(images, ImageFolder)
    return ImageSource(config, images, held_out=0.2, device="cpu")


def _layer(place: Path) -> str:
    """What transformers calls the last layer differs from version to version."""
    import transformers

    model = transformers.AutoModel.from_pretrained(place / "vit")
    return next(name for name, _ in model.named_modules() if name.endswith(("layer.1", "layers.1")))


def test_rows_are_patches_of_what_the_model_sees(place: Path) -> None:
    import transformers

    source = source_of(place)
    (chunk, _), *_ = source.chunks(None)
    number = int(chunk.group[0])
    assert source.text.files == tuple(sorted(source.text.files))
    model = transformers.AutoModel.from_pretrained(place / "vit").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(place / "vit")
    image = Image.open(place / "photos" / source.text.files[number]).convert("RGB")
    with torch.no_grad():
        expected = model(**processor(image, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0, 1:]
    torch.testing.assert_close(chunk.acts[source.hookpoints[0]][:4], expected, rtol=0, atol=1e-5)
    assert chunk.position is not None
    assert chunk.position[:5].tolist() == [1, 2, 3, 4, 1]  # without CLS
    assert source.tokenizer.grids == {source.hookpoints[0]: [1, 2, 2]}
    assert "40 images of 8 x 8 pixels, 2 x 2 patches: 4 rows of each" in source.inputs_in_words()
    with_cls = source_of(place, mask_special=False)
    assert next(iter(with_cls.chunks(None)))[0].position[:5].tolist() == [0, 1, 2, 3, 4]  # type: ignore[index]


def test_it_goes_on_at_every_cursor_and_a_cache_too(place: Path, tmp_path: Path) -> None:
    source = source_of(place, forward_tokens=256, document_seed=3)
    source._examples.at_once = 6  # type: ignore[attr-defined]
    chunks = list(source.chunks("train"))
    whole = torch.cat([chunk.acts[source.hookpoints[0]] for chunk, _ in chunks])
    for number, (_, cursor) in enumerate(chunks[:-1]):
        rest = torch.cat([chunk.acts[source.hookpoints[0]] for chunk, _ in source.chunks("train", cursor)])
        assert torch.equal(rest, whole[cursor["rows"] :]), number
    groups = [set(torch.cat([c.group for c, _ in source.chunks(split)]).tolist()) for split in ("train", "held_out")]  # type: ignore[arg-type]
    assert not groups[0] & groups[1]
    assert len(groups[0] | groups[1]) == 40
    for name, most in (("a", 60), ("a", 100), ("b", 100)):
        write_cache(tmp_path / name, source, shard_rows=20, max_tokens=most)
    files = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.safetensors")} for n in "ab"]
    assert files[0] == files[1]
    assert ActivationCache(tmp_path / "b").n_rows == 100


@pytest.mark.parametrize("how", ["--activations", "--stream"])
def test_a_run_ends_with_a_report_of_images(place: Path, tmp_path: Path, how: str, capsys: Any) -> None:
    run = tmp_path / "run"
    options = ["--d-sae", "32", "--k", "4", "--tokens", "600", "--batch-tokens", "64", "--run", str(run), "--held-out"]
    options += [
        "0.2",
        "--shuffle-tokens",
        "128",
        "--device",
        "cpu",
        how,
        *([] if how == "--stream" else [str(tmp_path / "acts")]),
    ]
    with pytest.raises(SystemExit) as ended:
        main(["train", str(place / "vit"), str(place / "photos"), "--hookpoint", _layer(place), *options])
    told = capsys.readouterr()
    assert ended.value.code == 0, told.err
    assert "images" in told.out
    assert "patches in" in told.out
    page, snippets = (run / "report.html").read_text(), read_snippets(run / "snippets.json")
    assert snippets.pictures
    assert snippets.pictures[0].rows == snippets.pictures[0].columns == 2
    assert {label for latent in snippets.latents for label in latent.top_tokens} <= {"cats", "dogs"}
    assert page.count("data:image/jpeg;base64,") == len(snippets.pictures) <= 40
    assert "dogs/" in page
    assert str(place) not in page
    assert "held-out patches" in page
    if how == "--activations":
        before = (run / "snippets.json").read_bytes()
        (run / "snippets.json").unlink()
        draw_report(run, Console(quiet=True))
        assert (run / "snippets.json").read_bytes() == before
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    "train",
                    "--activations",
                    str(tmp_path / "acts"),
                    *options[:8],
                    "--run",
                    str(tmp_path / "again"),
                    "--held-out",
                    "0.2",
                ]
            )
        assert ended.value.code == 0, capsys.readouterr().err
        assert read_snippets(tmp_path / "again" / "snippets.json").pictures


def test_pooled_images_are_shown_whole_and_gone_ones_by_name(place: Path, tmp_path: Path) -> None:
    source = source_of(place, hookpoint="pooler")
    assert source.tokenizer.grids == {"pooler": None}
    assert next(iter(source.chunks(None)))[0].group[:3].tolist() != [0, 0, 0]
    source.tokenizer.save_pretrained(tmp_path)
    pictures = Pictures.load(tmp_path, "photos")
    view = pictures.view(3)
    assert view.size == (8, 8)
    path = place / "photos" / pictures.images.files[3]
    expected = Image.open(path).resize((8, 8), Image.Resampling.BILINEAR)
    assert abs(sum(view.getpixel((4, 4))) - sum(expected.getpixel((4, 4)))) < 60  # type: ignore[arg-type]
    gone = Pictures(ImageFolder("x", tmp_path, ("gone.png",)), pictures.processor, {})
    assert gone.view(0) is None


@pytest.mark.parametrize(
    ("family", "settings", "hookpoint", "grid"),
    [
        ("ResNet", {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}, "stages.0",
         [0, 2, 2]),
        ("Dinov2WithRegisters", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
                                 "patch_size": 4, "num_register_tokens": 3}, "0", [4, 2, 2]),
    ],
)  # fmt: skip
def test_grids_of_other_models(
    place: Path, tmp_path: Path, family: str, settings: dict[str, Any], hookpoint: str, grid: list[int]
) -> None:
    import transformers

    write_model(tmp_path / "vit", family, **settings)
    (tmp_path / "photos").symlink_to(place / "photos")
    model = transformers.AutoModel.from_pretrained(tmp_path / "vit")
    wanted = [n for n, m in model.named_modules() if n.endswith(f".{hookpoint}") and list(m.children())]
    name = wanted[0]
    source = source_of(tmp_path, hookpoint=name)
    assert source.tokenizer.grids == {name: grid}


def test_clip_reads_images_where_the_folder_holds_images(place: Path, tmp_path: Path, tiny: Any) -> None:
    write_model(tmp_path / "vit")
    processor = (tmp_path / "vit" / "preprocessor_config.json").read_bytes()
    shutil.rmtree(tmp_path / "vit")
    tiny.MORE_FAMILIES["clip"]().save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_bytes(processor)
    (tmp_path / "photos").symlink_to(place / "photos")
    source = source_of(tmp_path, hookpoint="encoder.layers.0")
    assert source.widths == {"vision_model.encoder.layers.0": 16}
    assert source.tokenizer.grids == {"vision_model.encoder.layers.0": [1, 2, 2]}


def test_what_means_nothing_for_images_is_refused(place: Path, tmp_path: Path) -> None:
    for settings in ({"context_length": 64}, {"pack": True}, {"text_column": "x"}, {"prepend_bos": False}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))}: expected nothing beside the images"):
            source_of(place, **settings)
    with pytest.raises(ConfigError, match="vit reads images, not text: name a folder of them as the dataset"):
        cache_activations(
            ReadingConfig(str(place / "vit"), hookpoint="layers.1"), tmp_path / "acts", max_tokens=10, device="cpu"
        )
    bare = shutil.copytree(place / "vit", tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="bare has no image processor that can be read"):
        cache_activations(
            ReadingConfig(str(bare), str(place / "photos"), hookpoint="layers.1"),
            tmp_path / "acts",
            max_tokens=10,
            device="cpu",
        )


def test_a_loaded_model_and_its_processor_read_a_folder_too(place: Path, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModel.from_pretrained(place / "vit")
    processor = transformers.AutoImageProcessor.from_pretrained(place / "vit")
    reading: dict[str, Any] = {"hookpoint": _layer(place), "held_out": 0.2}
    given = flashsae.activations(model, processor, place / "photos", **reading)
    named = flashsae.activations(str(place / "vit"), None, str(place / "photos"), **reading)
    for one, other in zip(given, named, strict=True):
        assert torch.equal(one[_layer(place)], other[_layer(place)])
    assert given.source.identity["model"] != named.source.identity["model"]  # type: ignore[attr-defined]
    sae = flashsae.fit(named, d_sae=32, k=4, tokens=512, batch_tokens=64, shuffle_tokens=128, progress=False)
    assert flashsae.evaluate(sae, named.held_out).fvu < 1


def test_images_beside_other_files_are_meant_by_models_of_images(place: Path, tmp_path: Path, tiny: Any) -> None:
    photos = write_photos(tmp_path / "photos", 4)
    (photos / "labels.csv").write_text("text\nx")
    tiny.MORE_FAMILIES["clip"]().save_pretrained(tmp_path / "clip")
    tiny.gpt2().save_pretrained(tmp_path / "gpt2")
    for model, of_images in (("vit", True), ("clip", True), ("gpt2", False)):
        folder = place if model == "vit" else tmp_path
        opened = open_configured_text(ReadingConfig(str(folder / model), str(photos), text_column=None))
        assert isinstance(opened, ImageFolder) == of_images, model


def test_caches_of_images_are_not_merged_and_old_names_of_layers_are_known(place: Path, tmp_path: Path) -> None:
    layer = _layer(place)
    source = source_of(place, hookpoint=layer.replace("layers.", "encoder.layer."))
    assert source.hookpoints == (layer,)
    for name in "ab":
        write_cache(tmp_path / name, source, max_tokens=8)
    with pytest.raises(DataError, match=r"merge: .*a holds activations of images"):
        merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


def test_a_damaged_image_is_named_when_it_is_read(place: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 6)
    (tmp_path / "vit").symlink_to(place / "vit")
    (photos / "cats" / "zz.png").write_bytes(b"no image")
    source = source_of(tmp_path, shuffle_documents=False)
    with pytest.raises(DataError, match=r"cannot read the image .*zz.png"):
        list(source.chunks(None))
    assert json.loads(json.dumps(source.identity))["reads"] == "images"
