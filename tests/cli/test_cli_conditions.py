"""`sample.py --condition KEY=VALUE`: whatever a model's embedders read can be given in words."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from command_line import cli, run
from PIL import Image
from tiny_runs import class_embedder, description, randomized, save_run

import ldm
from ldm.cli import results
from ldm.cli.wanted import choose
from ldm.conditioning import Conditioner
from ldm.conditioning.bert import BERTEmbedder
from ldm.conditioning.vectors import Features, SinusoidalNumbers
from ldm.config import instantiate

__all__ = ["cli"]

SIZE = {"target": "ldm.conditioning.vectors.SinusoidalNumbers", "params": {"key": "size", "dim": 4}}
OWN = """
import torch
from torch import nn
from ldm.arguments import remembers_arguments
from ldm.conditioning import Embedder

@remembers_arguments
class Mood(Embedder):
    def __init__(self, dim: int):
        super().__init__("mood", "vector")
        self.table = nn.Linear(1, dim)

    def embed(self, values, dropped):
        return self.table(torch.tensor([[float(value.count("o"))] for value in values]))

    def from_text(self, text):
        if not text.isalpha():
            raise ValueError("a mood is one word")
        return text.lower()
"""


def caption(drop: float) -> dict:
    sizes = {"dim": 8, "depth": 1, "vocab_size": 128, "max_length": 6, "heads": 1, "dim_head": 8}
    return {"target": "ldm.conditioning.bert.BERTEmbedder", "params": {**sizes, "drop": drop}}


def described(*embedders: dict, width: int = 8, context: int | None = None) -> dict:
    found = description()
    params = found["model"]["params"]
    params["conditioner"]["params"]["embedders"] = list(embedders)
    params["network"]["params"] |= {"adm_in_channels": width, "context_dim": context}
    if width == 0:
        del params["network"]["params"]["num_classes"], params["network"]["params"]["adm_in_channels"]
    found["sampling"]["guidance"] = 1.0
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "size", described(SIZE))
    save_run(folder / "both", described(class_embedder(), SIZE, width=16))
    save_run(folder / "caption", described(caption(drop=0.1), width=0, context=8))
    save_run(folder / "never-dropped", described(caption(drop=0.0), width=0, context=8))
    return folder


@pytest.fixture
def letters(monkeypatch):
    """Texts as their letters' numbers, in the place of a tokenizer of another package."""

    def tokens(texts):
        return torch.tensor([[ord(letter) % 128 for letter in text.ljust(6)[:6]] for text in texts])

    monkeypatch.setattr("ldm.conditioning.bert.transformers_tokenizer", lambda *args: tokens)


def pngs(folder) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))}


def facts(path) -> dict:
    return json.loads(Image.open(path).text["ldm"])


def drawn(model, conditions, **asked) -> np.ndarray:
    batches = ldm.draw(model, conditions=conditions, **asked)
    return np.concatenate([results.to_uint8(batch) for batch in batches])


def test_numbers(runs, tmp_path, cli):
    fixed = ("--no-grid", "--out", tmp_path)
    for numbers in ("16,640", "900, 8.5"):
        result = cli("sample", runs / "size", "--n", 3, "--condition", f"size={numbers}", *fixed)
        assert result.status == 0, result.err
    found = pngs(tmp_path)
    assert list(found) == sorted(f"0000{i}-{name}.png" for i in range(3) for name in ("16_640", "900_8_5"))
    for name, numbers in (("16_640", [16.0, 640.0]), ("900_8_5", [900.0, 8.5])):
        expected = drawn(ldm.load(runs / "size"), {"size": torch.tensor([numbers] * 3)})
        assert np.array_equal([found[f"0000{i}-{name}.png"] for i in range(3)], expected)
    assert not np.array_equal(found["00000-16_640.png"], found["00000-900_8_5.png"])
    assert facts(tmp_path / "00001-900_8_5.png")["size"] == "900, 8.5"


def test_beside_classes(runs, tmp_path, cli):
    asked = ("--classes", "dog,cat", "--n", 2, "--condition", "size=16,640", "--guidance", 1)
    result = cli("sample", runs / "both", *asked, "--npz", "--out", tmp_path)
    assert result.status == 0, result.err
    found = pngs(tmp_path)
    assert list(found) == [f"0000{i}-{name}-16_640.png" for i, name in enumerate(("dog",) * 2 + ("cat",) * 2)]
    conditions = {"label": torch.tensor([1, 1, 0, 0]), "size": torch.tensor([[16.0, 640.0]] * 4)}
    assert np.array_equal(list(found.values()), drawn(ldm.load(runs / "both"), conditions))
    shown = facts(tmp_path / "00003-cat-16_640.png")
    assert (shown["class"], shown["size"]) == ("cat", "16,640")
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_1"].tolist() == [1, 1, 0, 0]


def test_texts(runs, tmp_path, cli, letters):
    text = "a red fox = two, " + "x" * 60
    fixed = ("--no-grid", "--out", tmp_path, "--guidance", 40)
    for given in (text, "boat"):
        result = cli("sample", runs / "caption", "--n", 2, "--condition", f"caption={given}", *fixed)
        assert result.status == 0, result.err
    found = pngs(tmp_path)
    long = "a_red_fox_two_" + "x" * 34
    assert list(found) == [f"0000{i}-{name}.png" for i in range(2) for name in (long, "boat")]
    expected = drawn(ldm.load(runs / "caption"), {"caption": ["boat", "boat"]}, guidance=40.0)
    assert np.array_equal([found["00000-boat.png"], found["00001-boat.png"]], expected)
    assert not np.array_equal(found["00000-boat.png"], found[f"00000-{long}.png"])
    assert facts(tmp_path / f"00000-{long}.png")["caption"] == text


def test_an_embedder_of_ones_own(tmp_path, monkeypatch):
    """One file with one class: `--config` names it, the word reaches it, and its own refusal is told."""
    (tmp_path / "moods.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = {"target": "moods.Mood", "params": {"dim": 8}}
    model = randomized(instantiate(described(own)["model"], allow_foreign=True))
    ldm.save(model, tmp_path / "model.safetensors")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"task": "diffusion", "conditioner": own}))

    def sample(*options):
        fixed = ("--n", 1, "--steps", 2, "--out", "out", "--no-grid")
        return run("sample.py", "model.safetensors", *fixed, *options, cwd=tmp_path)

    trusted = ("--config", "run.yaml")
    for mood in ("Doom", "calm"):
        result = sample(*trusted, "--condition", f"mood={mood}")
        assert result.status == 0, result.err
    found = pngs(tmp_path / "out")
    assert list(found) == ["00000-Doom.png", "00000-calm.png"]
    assert not np.array_equal(*found.values())
    assert facts(tmp_path / "out" / "00000-Doom.png")["mood"] == "Doom"
    expected = results.to_uint8(next(ldm.draw(model.eval(), conditions={"mood": ["doom"]}, steps=2)))
    assert np.array_equal(found["00000-Doom.png"], expected[0])
    refused = sample(*trusted, "--condition", "mood=so so")
    assert refused.status == 1
    assert refused.err.splitlines()[-1] == "error: --condition mood=so so: a mood is one word"
    assert (
        "moods.Mood' is outside ldm" in sample("--condition", "mood=calm").err
    )  # a file alone names no code


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("size", [], r"this model reads size \(--condition\); give --condition size=VALUE"),
        ("both", [], r"reads label \(--classes\), size \(--condition\); give --condition size=VALUE"),
        (
            "size",
            ["sise=3,4"],
            r"--condition sise=3,4: this model reads size \(--condition\); did you mean size",
        ),
        ("both", ["label=cat"], r"--condition label=cat: this model reads label \(--classes\), size"),
        ("size", ["size"], "--condition size: must be KEY=VALUE"),
        ("size", ["size=1,2", "size=3,4"], "--condition size=3,4: must be KEY=VALUE, once for each key"),
        ("size", ["size=wide"], "--condition size=wide: 'size' are numbers separated by commas, got 'wide'"),
        ("size", ["size="], "'size' are numbers separated by commas, got ''"),
    ],
)
def test_mistakes(runs, tmp_path, cli, model, words, message):
    given = [part for word in words for part in ("--condition", word)]
    result = cli("sample", runs / model, *given, "--out", tmp_path / "out")
    assert (result.status, result.out) == (1, "")
    assert re.search(message, result.err), result.err
    assert "Traceback" not in result.err and not (tmp_path / "out").exists()


def test_embedders_say_what_a_text_is():
    assert torch.equal(SinusoidalNumbers("size").from_text("1,-2.5"), torch.tensor([1.0, -2.5]))
    assert BERTEmbedder(8, 1).from_text("a fox, red") == "a fox, red"
    with pytest.raises(ValueError, match="what a Features reads cannot be given as text"):
        Features("tokens").from_text("1")


def test_what_no_words_can_give(runs):
    model = ldm.load(runs / "size")
    model.conditioner = Conditioner([*model.conditioner.embedders, Features("tokens")])
    with pytest.raises(ValueError, match="reads tokens, which no words can give: draw with ldm.draw"):
        choose(model, 1, None, None, ["size=1,2"])


def test_a_key_that_two_embedders_read_is_given_once(runs):
    model = ldm.load(runs / "size")
    model.conditioner = Conditioner([SinusoidalNumbers("size", 2), SinusoidalNumbers("size", 2)])
    wanted = choose(model, 3, None, None, ["size=5"])
    assert torch.equal(wanted.batch([0, 2])["size"], torch.tensor([[5.0], [5.0]]))
    assert model.conditioner(wanted.batch([0, 2]))["vector"].shape == (2, 4)


def test_guidance_of_published_models_is_not_refused(runs, tmp_path, cli, letters):
    """They do not say what their training dropped; models of one's own do."""
    model = ldm.load(runs / "never-dropped")
    ldm.save(model, tmp_path / "ours.safetensors")
    del model.description.sampling["guidance"]
    ldm.save(model, tmp_path / "theirs.safetensors")
    asked = ("--n", 1, "--condition", "caption=fox", "--no-grid", "--out", tmp_path / "out")
    assert "drop is 0" in cli("sample", tmp_path / "ours.safetensors", *asked, "--guidance", 3).err
    plain = cli("sample", tmp_path / "theirs.safetensors", *asked)
    assert plain.status == 0, plain.err
    before = pngs(tmp_path / "out")
    guided = cli("sample", tmp_path / "theirs.safetensors", *asked, "--guidance", 3, "--overwrite")
    assert guided.status == 0, guided.err
    assert not np.array_equal(before["00000-fox.png"], pngs(tmp_path / "out")["00000-fox.png"])
