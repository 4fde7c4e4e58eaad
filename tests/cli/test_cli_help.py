"""Help pages, exit statuses and what a command costs before it starts."""

import re
import subprocess
import sys

import pytest
from command_line import ROOT, cli, environment, run
from tiny_runs import description, save_run

import ldm
from ldm.cli import VERBS

__all__ = ["cli"]


def plain(text: str) -> str:
    """Without colours, frames and line breaks."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return " ".join(re.sub(r"[│╭╮╰╯─*]", " ", text).split())


def test_ldm_lists_its_verbs():
    for arguments in ((), ("-h",), ("--help",)):
        result = run("ldm", *arguments)
        assert result.status == 0
        assert result.err == ""
        for verb, (_, line) in VERBS.items():
            assert f"{verb} {line}" in plain(result.out)


def test_version_and_unknown_verbs():
    assert run("ldm", "--version").out == f"ldm {ldm.__version__}\n"
    result = run("ldm", "smaple")
    assert result.status == 2
    assert "No such command 'smaple'. Did you mean 'sample'?" in plain(result.err)


PAGES = {
    "train": ["CONFIG", "KEY=VALUE", "--print-config", "--dry-run", "--verbose", "runs/<name>"],
    "sample": [
        *("[OPTIONS] MODEL", "--shift"),
        *("MODEL", "--n", "--classes", "--seed", "--sampler", "--steps", "--guidance", "--eta", "--spacing"),
        *("--image", "each image with each class"),
        *(
            "--ema",
            "--no-ema",
            "--out",
            "--grid",
            "--npz",
            "--overwrite",
            "--batch-size",
            "--exact",
            "--device",
        ),
        *("--precision", "dpmpp_2m", "[default: (the model's own)]", "[default: 64]"),
    ],
    "encode": ["MODEL", "IMAGES", "--out", "--size", "--latents", "--overwrite", "--device", "figures.csv"],
    "convert": ["SRC", "DST", "--to", "native|compvis|diffusers", "--config", "--no-ema", "--overwrite"],
    "verify": ["FOLDER", "--workers", "status 1"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_pages_name_everything(verb, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = cli(verb, "--help")
    assert result.status == 0
    for words in PAGES.get(verb, []):
        assert words in plain(result.out), words
    assert all(len(line) <= 100 for line in result.out.splitlines())
    assert "<int range>" not in result.out  # metavars are chosen, not made up
    assert cli(verb, "-h").out == result.out


@pytest.mark.parametrize("program", ["train.py", "sample.py"])
def test_programs_go_by_their_own_names(program):
    result = run(program, "--help")
    assert result.status == 0
    assert f"Usage: {program} [OPTIONS]" in result.out
    assert run(program).status == 2


def test_the_same_command_by_both_names(tmp_path):
    folder = save_run(tmp_path / "run", description())
    for i, start in enumerate((("sample.py",), ("ldm", "sample"))):
        assert run(*start, folder, "--n", 1, "--out", tmp_path / str(i)).status == 0
    assert (tmp_path / "0" / "00000-cat.png").read_bytes() == (tmp_path / "1" / "00000-cat.png").read_bytes()


def test_mistakes_in_a_training_config(tmp_path, cli):
    result = cli("train", tmp_path / "none.yaml")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert "no such file" in result.err
    (tmp_path / "some.yaml").write_text("task: autoencoder\nnam: x\n")
    result = cli("train", tmp_path / "some.yaml", "training.stpes=3")
    assert result.status == 1
    assert "Traceback" not in result.err
    assert "stpes" in result.err


def test_pages_load_nothing_heavy():
    code = """if True:
        import sys
        from ldm.cli import VERBS, main
        for verb in VERBS:
            sys.argv = ["ldm", verb, "--help"]
            try:
                main()
            except SystemExit as end:
                assert not end.code
        print([name for name in ("torch", "numpy", "PIL", "omegaconf") if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys; before = set(sys.modules); import ldm; ldm.__version__; "
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "['ldm']"
