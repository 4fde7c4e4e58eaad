"""Images as conditions: the embedder, runs that train with it, and `sample.py --image`."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import training_runs as T
from command_line import cli, run
from image_runs import ENCODER, image_config, image_description, image_embedder
from PIL import Image
from safetensors.torch import save_file
from tiny_runs import SIZE, class_embedder, description, first_stage_description, save_run

import ldm
from ldm.checkpoints import native
from ldm.cli import results
from ldm.cli.wanted import choose
from ldm.conditioning import ClassEmbedder, Conditioner, ImageEmbedder
from ldm.data import ImageFolder
from ldm.data.images.given import Pictures, find_images
from ldm.models.vit import VisionTransformer
from ldm.nn.patch import interpolate_positions
from ldm.sampling import draw
from ldm.training.methods.first_stage import load_encoders

__all__ = ["cli"]

BATCH, WIDTH, TOKENS = 3, ENCODER["embed_dim"], 1 + 2 * 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def encoder(seed: int = 0, **options) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(**{**ENCODER, **options})


def images(size: int = 8, channels: int = 3, count: int = BATCH) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def seen(embedder: ImageEmbedder, values: torch.Tensor) -> torch.Tensor:
    """What the encoder is given."""
    given = []
    handle = embedder.model.patch_embed.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    embedder.embed(values, None)
    handle.remove()
    return given[0]


# The embedder


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("dim", [None, WIDTH, 7])
@pytest.mark.parametrize("kind", ["crossattn", "vector"])
def test_shapes(kind, dim, distilled):
    embedder = ImageEmbedder(encoder(distilled=distilled), dim, kind)
    assert isinstance(embedder.proj, torch.nn.Linear) == (dim == 7)
    for found in (
        Conditioner([embedder])({"image": images()}),
        Conditioner([embedder]).unconditional(BATCH),
    ):
        assert list(found) == [kind]
        width = dim or WIDTH
        assert found[kind].shape == ((BATCH, TOKENS, width) if kind == "crossattn" else (BATCH, width))


def test_features_are_those_of_the_encoder():
    model = encoder(distilled=True)
    features = model.forward_features(images())  # class token, distillation token, patches
    tokens = ImageEmbedder(model).embed(images(), None)
    assert torch.equal(tokens, features[:, [0, 2, 3, 4, 5]])
    assert torch.equal(ImageEmbedder(model, kind="vector").embed(images(), None), features[:, 0])


@pytest.mark.parametrize("kind", ["crossattn", "vector"])
def test_no_image_is_zeros(kind):
    conditioner = Conditioner([ImageEmbedder(encoder(), 7, kind, drop=0.3)])
    whole = conditioner({"image": images()})[kind]
    found = conditioner({"image": images()}, torch.tensor([[0.29, 0.31, 0.1]]))[kind]
    assert not found[0].any() and not found[2].any()
    assert torch.equal(found[1], whole[1]) and whole.any()
    assert not conditioner.unconditional(2)[kind].any()


def test_a_frozen_encoder_stays_as_it_is():
    embedder = ImageEmbedder(encoder(drop_path_rate=0.5, drop_rate=0.5), 7).train()
    assert embedder.training and embedder.proj.training
    assert not any(module.training for module in embedder.model.modules())
    first, again = (embedder.embed(images(), None) for _ in range(2))
    assert torch.equal(first, again)  # nothing is left out at random
    first.square().sum().backward()
    assert {name for name, p in embedder.named_parameters() if p.grad is not None} == {
        "proj.weight",
        "proj.bias",
    }
    assert not any(p.requires_grad for p in embedder.model.parameters())
    assert all(p.grad.any() for p in embedder.proj.parameters())


@pytest.mark.parametrize("options", [{}, {"num_classes": 5}, {"num_classes": 5, "distilled": True}])
@pytest.mark.parametrize("kind", ["crossattn", "vector"])
def test_every_parameter_of_a_trained_encoder_gets_a_gradient(kind, options):
    embedder = ImageEmbedder(encoder(**options), 7, kind, trainable=True).train()
    assert embedder.model.training
    embedder.embed(images(count=16), None).square().sum().backward()
    for name, parameter in embedder.named_parameters():
        used = not name.startswith(("model.head.", "model.head_dist."))
        assert parameter.requires_grad == used, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == used, name


def test_no_graph_where_none_is_asked_for():
    embedder = ImageEmbedder(encoder(), 7, trainable=True)
    with torch.no_grad():
        assert not embedder.embed(images(), None).requires_grad


def test_images_of_the_size_are_taken_as_they_are():
    assert torch.equal(seen(ImageEmbedder(encoder()), images()), images())


def test_other_sizes_are_resized_with_antialiasing():
    embedder = ImageEmbedder(encoder())
    constant = torch.full((1, 3, 40, 24), 0.25)
    assert torch.allclose(seen(embedder, constant), torch.full((1, 3, 8, 8), 0.25), atol=1e-6)
    # A chessboard of pixels has no contrast at a third of its size; its every third pixel has all of it.
    board = (torch.arange(24)[:, None] + torch.arange(24)) % 2 * 2.0 - 1
    assert seen(embedder, board.expand(1, 3, -1, -1))[..., 2:-2, 2:-2].abs().max() < 0.1
    ramp = torch.linspace(-0.75, 0.75, 4).expand(1, 3, 4, 4)  # enlarged, it stays a ramp
    inner = seen(embedder, ramp)[..., 2:6]
    assert torch.allclose(inner.diff(dim=-1), torch.full_like(inner[..., 1:], 0.25), atol=0.05)


def test_normalization_is_that_of_the_weights():
    x = images()
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    expected = ((x + 1) / 2 - mean) / std
    given = seen(ImageEmbedder(encoder(), normalization="imagenet"), x)
    assert torch.allclose(given, expected, atol=1e-6)
    assert ImageEmbedder(encoder()).state_dict().keys() == {f"model.{n}" for n in encoder().state_dict()}


def test_grey_images():
    assert torch.equal(seen(ImageEmbedder(encoder(in_chans=1)), images(channels=1)), images(channels=1))
    repeated = seen(ImageEmbedder(encoder()), images(channels=1))
    assert torch.equal(repeated, images(channels=1).expand(-1, 3, -1, -1))


def test_weights_are_taken_strictly_but_for_the_heads():
    source = encoder(1, num_classes=5)
    embedder = ImageEmbedder(encoder())
    embedder.take_weights(source.state_dict())
    assert torch.equal(embedder.embed(images(), None), source.forward_features(images()))
    kept = encoder(2, num_classes=4, representation_size=6)
    head = kept.head.weight.clone()
    ImageEmbedder(kept).take_weights(source.state_dict())
    assert torch.equal(kept.head.weight, head)
    assert torch.equal(kept.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)


def test_weights_that_do_not_fit_are_named():
    embedder = ImageEmbedder(encoder())
    tensors = encoder().state_dict()
    renamed = {name.replace("blocks.1.norm2", "blocks.1.ln"): value for name, value in tensors.items()}
    with pytest.raises(ValueError, match=r"missing: blocks.1.norm2.bias, .*weight; not known: blocks.1.ln.b"):
        embedder.take_weights(renamed)
    with pytest.raises(ValueError, match="not known: dist_token$"):
        embedder.take_weights(encoder(distilled=True).state_dict())
    with pytest.raises(ValueError, match="missing: blocks.0.attn.proj.bias.* and 19 more; not known: w$"):
        embedder.take_weights({"w": torch.zeros(1), "pos_embed": torch.zeros(1, 5, WIDTH)})
    with pytest.raises(ValueError, match=r"blocks.0.mlp.fc1.weight \(24, 12\) instead of \(48, 12\)"):
        embedder.take_weights(encoder(mlp_ratio=2.0).state_dict())
    with pytest.raises(ValueError, match="7 patches are no square"):
        embedder.take_weights(tensors | {"pos_embed": torch.zeros(1, 8, WIDTH)})


def test_positions_are_interpolated_to_the_encoders_grid():
    source = encoder(1)  # 2x2 patches
    embedder = ImageEmbedder(encoder(2, img_size=16))  # 4x4
    embedder.take_weights(source.state_dict())
    expected = interpolate_positions(source.pos_embed, (2, 2), (4, 4), 1)
    assert torch.equal(embedder.model.pos_embed, expected)
    assert torch.equal(embedder.model.pos_embed[:, 0], source.pos_embed[:, 0])  # the class token's
    assert embedder.embed(images(16), None).shape == (BATCH, 1 + 16, WIDTH)


def test_wrong_uses():
    with pytest.raises(ValueError, match="is 'concat', must be one of crossattn, vector"):
        ImageEmbedder(encoder(), kind="concat")
    with pytest.raises(ValueError, match="kind is 'token', must be one of"):
        ImageEmbedder(encoder(), kind="token")
    with pytest.raises(ValueError, match="'clip', must be one of half, imagenet"):
        ImageEmbedder(encoder(), normalization="clip")
    with pytest.raises(ValueError, match="must be a VisionTransformer, got Linear"):
        ImageEmbedder(torch.nn.Linear(1, 1))
    conditioner = Conditioner([ImageEmbedder(encoder())])
    with pytest.raises(ValueError, match="cached latents come without the images; set cache=false"):
        conditioner({"mean": torch.zeros(1), "std": torch.zeros(1)})
    with pytest.raises(ValueError, match="reads the key 'image', but the batch has only label"):
        conditioner({"label": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"images \(B, C, H, W\), got \(3, 8, 8\)"):
        conditioner({"image": images()[0]})
    with pytest.raises(ValueError, match="'image' has 3 channels, the encoder takes 1"):
        Conditioner([ImageEmbedder(encoder(in_chans=1))])({"image": images()})


# Where its weights come from


def test_weights_of_files(tmp_path):
    tensors = encoder(1, num_classes=1000).state_dict()
    save_file(tensors, tmp_path / "timm.safetensors")
    torch.save({"model": tensors}, tmp_path / "deit.pth")
    for name in ("timm.safetensors", "deit.pth"):
        embedder = ImageEmbedder(encoder(), weights=str(tmp_path / name))
        load_encoders(Conditioner([ClassEmbedder(2, 3), embedder]))
        assert torch.equal(embedder.model.cls_token, tensors["cls_token"])


def test_weights_that_are_missing(tmp_path):
    with pytest.raises(ValueError, match="not trained and has no .?weights"):
        load_encoders(Conditioner([ImageEmbedder(encoder())]))
    load_encoders(Conditioner([ImageEmbedder(encoder(), trainable=True)]))
    gone = str(tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=f"{gone} of the ImageEmbedder do not exist; give a run folder or"):
        load_encoders(Conditioner([ImageEmbedder(encoder(), weights=gone)]))
    autoencoder = save_run(tmp_path / "ae", first_stage_description())
    with pytest.raises(ValueError, match=f"weights {autoencoder}: .*not known: decoder.conv_in.bias"):
        load_encoders(Conditioner([ImageEmbedder(encoder(), weights=str(autoencoder))]))


# Training


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Images, a first stage, and a classifier whose encoder the runs take; `runs/both` is trained."""
    place = tmp_path_factory.mktemp("images")
    pictures, runs = T.write_images(place / "images"), place / "runs"
    save_run(runs / "ae", first_stage_description())
    classifier = {
        "task": "classifier",
        "name": "vit",
        "runs": str(runs),
        "data": {"target": "ldm.data.ImageFolder", "params": {"root": str(pictures), "size": 8}},
        "model": {
            "target": "ldm.models.vit.VisionTransformer",
            "params": ENCODER | {"num_classes": "auto"},
        },
        "training": T.TRAINING | {"steps": 2},
        "logging": T.LOGGING,
    }
    T.finish(T.write_config(place / "vit.yaml", classifier), log=place / "log")
    image = image_embedder({"img_size": 16}, weights=str(runs / "vit"))
    alone = image_config(pictures, runs, runs / "ae", [image])
    both = image_config(pictures, runs, runs / "ae", [image, class_embedder(num_classes="auto")])
    T.write_config(place / "alone.yaml", alone)
    T.write_config(place / "both.yaml", both)
    T.finish(place / "both.yaml", "name=both", "training.steps=6", log=place / "both.log")
    return place


def tile(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    """A 16x16 image of a sheet with images in front of their rows; column 0 is the one in front."""
    top, left = 2 + row * 66, 2 if column == 0 else 68 + 8 + 2 + (column - 1) * 66
    return sheet[top : top + 64 : 4, left : left + 64 : 4]


def plain(sample: dict) -> np.ndarray:
    return ((sample["image"].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_run_trains_validates_and_draws(place):
    run_folder = place / "runs" / "both"
    assert "Warning" not in (place / "both.log").read_text()
    assert [row["step"] for row in T.rows(run_folder, "validation")] == ["2", "4", "6"]
    assert T.leftovers(run_folder) == []
    assert not (place / "runs" / "latents").exists()
    model, classifier = ldm.load(run_folder), ldm.load(place / "runs" / "vit")
    image = model.conditioner.embedders[0]
    assert torch.equal(image.model.blocks[1].attn.qkv.weight, classifier.blocks[1].attn.qkv.weight)
    assert torch.equal(image.model.pos_embed, interpolate_positions(classifier.pos_embed, (2, 2), (4, 4), 1))


def test_grids_show_the_images_in_front_of_their_samples(place):
    held_out = ImageFolder(place / "images", SIZE, validation=0.2).split("validation")
    sheets = [pixels(path) for path in sorted((place / "runs" / "both" / "images").glob("samples-*.png"))]
    assert len(sheets) == 3
    for sheet in sheets:
        assert sheet.shape == (2 * 66 + 2, 68 + 8 + 2 * 66 + 2, 3)
        for row, index in enumerate((0, len(held_out) - 1)):
            assert np.array_equal(tile(sheet, row, 0), plain(held_out[index]))
            assert not np.array_equal(tile(sheet, row, 1), tile(sheet, row, 2))
    assert not np.array_equal(sheets[0], sheets[2])


def test_a_run_goes_on_in_the_same_bits(place):
    (place / "runs" / "vit").rename(place / "runs" / "moved")  # needed at the beginning alone
    try:
        config = place / "both.yaml"
        assert "moved" not in config.read_text()
        said = T.finish(config, "name=again", "training.steps=4", log=place / "log", code=1)
        assert "vit of the ImageEmbedder do not exist" in said
        (place / "runs" / "moved").rename(place / "runs" / "vit")
        T.finish(config, "name=again", "training.steps=4", log=place / "log")
        (place / "runs" / "vit").rename(place / "runs" / "moved")
        said = T.finish(config, "name=again", "training.steps=6", log=place / "log")
        assert "at step 4 of 6" in said
    finally:
        (place / "runs" / "moved").rename(place / "runs" / "vit")
    assert T.run_differences(place / "runs" / "both", place / "runs" / "again") == []


def test_images_alone_and_a_dry_run(place):
    said = T.finish(place / "alone.yaml", "--dry-run", log=place / "log")
    assert "sample     image" in said and "parameters conditioner" in said
    T.finish(place / "alone.yaml", "training.steps=2", log=place / "log")
    description = native.read_description(place / "runs" / "ldm" / native.MODEL_FILE)
    assert len(description["model"]["params"]["conditioner"]["params"]["embedders"]) == 1


@pytest.mark.parametrize("option", [(), ("--dry-run",)])
def test_cached_latents_are_refused_before_anything_is_encoded(place, option):
    said = T.finish(place / "both.yaml", "name=cached", "cache=true", *option, log=place / "log", code=1)
    assert "Traceback" not in said
    assert "ImageEmbedder reads 'image', but cached latents" in said and "set cache=false" in said
    assert "encoding" not in said
    assert not (place / "runs" / "latents").exists() and not (place / "runs" / "cached").exists()


def stage_of(place: Path, config: str, *overrides: str):
    return T.build_method(place / config, overrides, rehearsal=True)


def test_pixels_need_no_cache(place):
    stage = stage_of(place, "alone.yaml", "cache=true", "first_stage=null")
    assert stage.train_set[0]["image"].shape == (3, SIZE, SIZE)


def test_grids_take_the_classes_of_their_images(place):
    stage = stage_of(place, "both.yaml", "logging.images=5")
    given = []
    model = stage.model
    model.conditioner.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with stage.evaluating():
        picture = stage.draw()
    held_out = stage.validation_set
    assert picture.size == (68 + 8 + 3 * 66 + 2, 2 * 66 + 2)  # two rows of three and two
    assert given[0]["label"].tolist() == [int(held_out[i]["label"]) for i in (0, 0, 0, 2, 2)]
    assert torch.equal(given[0]["image"][4], held_out[2]["image"])


def test_fewer_held_out_images_than_rows(place):
    stage = stage_of(place, "alone.yaml", "data.params.validation=1", "logging.images=9")
    assert len(stage.validation_set) == 1
    with stage.evaluating():
        assert stage.draw().size == (68 + 8 + 9 * 66 + 2, 66 + 2)


@pytest.mark.parametrize(
    "overrides, told",
    [
        (
            ["conditioner.params.embedders.0.params.model.params.in_chans=1"],
            "patch_embed.proj.weight .12, 3, 4, 4",
        ),
        (["conditioner.params.embedders.0.params.weights=null"], "not trained and has no .?weights"),
        (["conditioner.params.embedders.0.params.key=photo"], "reads the key 'photo', but the batch has"),
    ],
)
def test_mistakes_are_told_when_the_stage_is_built(place, overrides, told):
    with pytest.raises(ValueError, match=told):
        stage_of(place, "both.yaml", *overrides)


# sample.py --image


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_run(folder / "image", image_description())
    save_run(folder / "both", image_description(classes=True))
    save_run(folder / "classes", description())
    save_run(folder / "nothing", description(conditional=False))
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three images in folders, two of them 16x16."""
    folder = tmp_path / "photos"
    random = np.random.default_rng(0)
    for name, width, height in (("a.png", 16, 16), ("b c.png", 16, 16), ("more/a.jpg", 40, 30)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    return folder


def drawn(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[0-9]*.png"))}


def facts(path) -> dict:
    return json.loads(Image.open(path).text["ldm"])


def test_variations_in_a_real_process(place, photos, tmp_path):
    """Of the trained model, with a file among the images that is none."""
    (photos / "broken.png").write_bytes(b"no image")
    options = ("--classes", "dog,cat", "--n", 2, "--out", "out", "--npz")
    result = run("sample.py", place / "runs" / "both", "--image", "photos", *options, cwd=tmp_path)
    assert result.status == 1  # for the broken one alone
    assert re.search(r"broken.png: UnidentifiedImageError", result.err)
    assert "error: nothing is drawn of 1 image that cannot be read, see above" in result.err
    assert "Traceback" not in result.err
    assert result.out == "12 images in out, all on one sheet: out/grid.png\n"
    names = [
        f"{i:05d}-{stem}-{name}.png"
        for i, (stem, name) in enumerate(
            (stem, name) for stem in ("a", "b_c", "a") for name in ("dog", "cat") for _ in range(2)
        )
    ]
    assert sorted(os.listdir(tmp_path / "out")) == [*names, "grid.png", "samples.npz"]
    found = facts(tmp_path / "out" / names[10])
    assert (found["index"], found["image"], found["class"]) == (10, "photos/more/a.jpg", "cat")
    with np.load(tmp_path / "out" / "samples.npz") as archive:
        assert archive["arr_1"].tolist() == [1, 1, 0, 0] * 3


def test_sheet_has_a_row_an_image_with_the_image_in_front(models, photos, tmp_path, cli):
    result = cli("sample", models / "image", "--image", photos, "--n", 2, "--out", tmp_path / "out")
    assert result.status == 0, result.err
    sheet = pixels(tmp_path / "out" / "grid.png")
    assert sheet.shape == (3 * 66 + 2, 68 + 8 + 2 * 66 + 2, 3)
    assert np.array_equal(tile(sheet, 0, 0), pixels(photos / "a.png"))
    assert np.array_equal(tile(sheet, 1, 0), pixels(photos / "b c.png"))
    for i, name in enumerate(drawn(tmp_path / "out")):
        assert np.array_equal(tile(sheet, i // 2, 1 + i % 2), pixels(tmp_path / "out" / name))
    assert "class" not in facts(tmp_path / "out" / "00000-a.png")


def test_sheets_of_many(models, photos, tmp_path, cli, monkeypatch):
    fixed = ("sample", models / "image", "--steps", 1, "--out", tmp_path / "out", "--overwrite")
    assert cli(*fixed, "--image", photos / "a.png", "--n", 21).status == 0
    assert Image.open(tmp_path / "out" / "grid.png").size == (5 * 66 + 2, 5 * 66 + 2)  # longer than a row
    monkeypatch.setattr(results, "_GRID_MOST", 6)
    result = cli(*fixed, "--image", photos, "--n", 2)
    assert "the first 4 on one sheet" in result.out
    assert Image.open(tmp_path / "out" / "grid.png").size == (68 + 8 + 2 * 66 + 2, 2 * 66 + 2)


def test_batch_size_number_and_company_change_no_bit(models, photos, tmp_path, cli):
    def drawn_with(name, *options, image=photos):
        fixed = ("--sampler", "ddpm", "--steps", 2, "--out", tmp_path / name, "--image", image)
        result = cli("sample", models / "both", *fixed, *options)
        assert result.status == 0, result.err
        return drawn(tmp_path / name)

    whole = drawn_with("a", "--n", 7)
    assert len(whole) == len(set(whole.values())) == 21
    assert list(whole)[6:9] == ["00006-a-cat.png", "00007-b_c-cat.png", "00008-b_c-dog.png"]
    assert drawn_with("b", "--n", 7, "--batch-size", 1) == whole
    assert drawn_with("c", "--n", 7, "--batch-size", 5) == whole
    alone = drawn_with("d", "--n", 7, image=photos / "a.png")
    assert alone == {name: whole[name] for name in alone} and len(alone) == 7


def test_the_image_decides_and_not_without_it(models, photos, tmp_path, cli):
    """From the same noise: with guidance 0, no image, both are the same."""
    for guidance in (0, 1, 3):
        for name in ("a", "b c"):
            fixed = ("--n", 1, "--guidance", guidance, "--out", tmp_path / str(guidance), "--no-grid")
            result = cli("sample", models / "image", "--image", photos / f"{name}.png", *fixed)
            assert result.status == 0, result.err
    found = {
        (guidance, name): pixels(tmp_path / guidance / f"00000-{name}.png").astype(int)
        for guidance in "013"
        for name in ("a", "b_c")
    }
    assert np.array_equal(found["0", "a"], found["0", "b_c"])
    assert not np.array_equal(found["1", "a"], found["1", "b_c"])
    assert not np.array_equal(found["1", "a"], found["3", "a"])


def test_images_are_those_of_training(models, photos):
    """Upright, the centre, resized, as `ImageFolder` gives them."""
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.open(photos / "more" / "a.jpg").save(photos / "turned.jpg", exif=exif)
    Image.fromarray(np.full((20, 30, 4), 90, np.uint8)).save(photos / "transparent.png")
    dataset = ImageFolder(photos, SIZE, layout="flat", validation=0.0)
    wanted = choose(ldm.load(models / "image"), 1, None, photos)
    assert [wanted.pictures.path(i) for i in range(5)] == [dataset.path(i) for i in range(5)]
    expected = torch.stack([dataset[i]["image"] for i in range(5)])
    assert torch.equal(wanted.batch(range(5))["image"], expected)
    grey = Pictures(*find_images(photos), SIZE, 1)
    assert grey.pixels(0).shape == (1, SIZE, SIZE)


@pytest.mark.parametrize("options", [{"exact": True}, {"exact": False, "batch_size": 7}])
def test_the_model_sees_these_images(models, photos, options):
    model = ldm.load(models / "both")
    given = []
    model.conditioner.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    wanted = choose(model, 3, "2,0", photos)
    drawn = draw(model, wanted.count, wanted.batch, guidance=1.0, steps=1, **options)
    assert sum(len(images) for images in drawn) == 18
    assert len(given) > 1
    labels, shown = (torch.cat([batch[key] for batch in given])[:18] for key in ("label", "image"))
    assert labels.tolist() == [2, 2, 2, 0, 0, 0] * 3
    each = wanted.batch([0, 6, 12])["image"]
    assert torch.equal(shown, each.repeat_interleave(6, dim=0))
    assert not torch.equal(each[0], each[1])


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("image", (), "draws variations of images: give --image PATH, an image or a folder of images"),
        ("both", ("--classes", "cat"), "give --image PATH"),
        ("classes", ("--image", "photos"), r"--image was given, but this model reads label \(--classes\)"),
        ("nothing", ("--image", "photos"), "--image was given, but this model reads nothing"),
        ("image", ("--image", "photos", "--classes", "cat"), "this model is not conditioned on classes"),
        ("both", ("--image", "photos", "--classes", "cta"), "Did you mean 'cat'"),
        ("image", ("--image", "photso"), "photso does not exist; did you mean .*photos"),
        ("image", ("--image", "empty"), "no images under .*empty"),
        ("image", ("--image", "bad"), r"no image of --image .*bad can be read: x.png: Unidentified"),
        ("image", ("--image", "bad/x.png"), r"no image of --image .*x.png can be read: x.png: Unidentified"),
        ("image", ("--image", "photos", "--out", "photos/out"), "lies inside .*photos"),
    ],
)
def test_mistakes(models, photos, tmp_path, cli, monkeypatch, model, options, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    result = cli("sample", models / model, "--out", "out", *options)
    assert result.status == 1
    assert re.search(message, result.err), result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_models_that_the_command_does_not_know(models, photos):
    model = ldm.load(models / "both")
    model.image_size = (16, 32)
    with pytest.raises(ValueError, match="cut to squares, but this model is of 32x16 pixels"):
        choose(model, 1, None, photos)
    model.conditioner.embedders[0].kind = "concat"  # an image to complete, say
    with pytest.raises(
        ValueError, match="this model reads image, which no words can give: draw with ldm.draw"
    ):
        choose(model, 1, None, photos)
    model.conditioner.embedders[0].key = "caption"
    with pytest.raises(ValueError, match="this model reads caption, which no words can give"):
        choose(model, 1)


def test_long_names_are_cut(models, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / ("狐" * 60 + ".png"))
    model = ldm.load(models / "both")
    model.description.classes = ["狐" * 100, "b", "c"]
    (name,) = choose(model, 1, "0", tmp_path).file_names()
    assert name == f"00000-{'狐' * 24}-{'狐' * 24}.png"
