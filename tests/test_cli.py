"""The command line: each command, its exit codes, its sentences."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastlm
from fastlm import _native, cli
from fastlm.train import PRESETS
from fastlm.train.config import decide
from fastlm.train.plan import estimate

SMALL = [
    "--tokenizer",
    "byte",
    "--n-layer",
    "1",
    "--n-head",
    "2",
    "--n-embd",
    "16",
    "--block-size",
    "16",
    "--batch-size",
    "4",
    "--steps",
    "6",
    "--evaluations",
    "2",
    "--evaluation-tokens",
    "256",
    "--sample-tokens",
    "8",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--threads",
    "1",
    "--no-keep-memory",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "count.txt"
    path.write_text("".join(f"{i} sheep and {i * i} stars\n" for i in range(500)))
    return str(path)


@pytest.fixture
def quick_peak(monkeypatch):
    """Training says its share of the machine's peak; measuring that peak is tested with the benchmarks."""
    monkeypatch.setattr(cli, "_peak", lambda config: 1e9)


@pytest.fixture
def run(text, tmp_path, quick_peak, capsys) -> str:
    out = str(tmp_path / "run")
    assert cli.main(["train", "--data", text, "--out", out, *SMALL]) == 0
    capsys.readouterr()
    return out


def fails(capsys, arguments, code) -> str:
    assert cli.main(arguments) == code
    return capsys.readouterr().err


def test_train_says_what_it_does_in_plain_lines(text, tmp_path, quick_peak, capsys):
    out = str(tmp_path / "run")
    assert cli.main(["train", "--data", text, "--out", out, *SMALL]) == 0
    said = capsys.readouterr().out
    result = json.loads(Path(out, "result.json").read_text())
    assert re.search(
        r"^3/6  loss \d\.\d{3}  val \d\.\d{3}  bits/byte  lr \d\.\de-0\d  \|g\| \d+\.\d\d  [\d,]+ tokens/s"
        r"  \d+ % of peak  \d:\d\d left$",
        said,
        re.MULTILINE,
    )
    assert f"held out    {result['val_bits_per_byte']:.3f} bits per byte; a 5-gram: " in said
    assert f"run         {out}: loss.png, metrics.jsonl, sample.txt, checkpoints" in said


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_peak_is_that_of_the_precision(precision, dtype, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fastlm.benchmarks.limits.measure_peak", lambda *args, **keywords: asked.append((args, keywords))
    )
    cli._peak(PRESETS["tiny"].replace(precision=precision, device="cuda"))
    assert asked == [((dtype,), {"device": "cuda"})]


def test_live_line_on_a_terminal(monkeypatch, capsys):
    from rich.console import Console

    from fastlm.train import ConsoleProgress, Evaluation

    def said(width, peak):
        progress = ConsoleProgress()
        progress._out = Console(force_terminal=True, width=width, file=sys.stdout)
        with progress.steps(total=20_000, done=11_998, flops=10**9, peak=peak):
            progress.step(11_999, 3.0, 1.5, 1e-3, 0.5, 10_000, 0.5)
            progress.evaluated(11_999, Evaluation(2.0, 1.25, 100))
            progress.step(12_000, 3.0, 1.5, 1e-3, 0.5, 10_000, 0.5)
        return re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", capsys.readouterr().out)

    whole = "12,000/20,000  loss 1.500  val 1.250  bits/byte  lr 1.0e-03  |g| 0.50  20,000 tokens/s"
    assert re.search(re.escape(whole) + r"  \d+:\d\d left", said(150, None))
    assert re.search(re.escape(whole) + r"  50 % of peak  \d+:\d\d left", said(150, 4e9))
    assert re.search(r"12,000/20,000  loss 1\.500  val 1\.250  .*50 % of peak  \d+:\d\d left *\s", said(80, 4e9))
    assert re.search(r"12,000/20,000  loss 1\.500  \d+:\d\d left *\s", said(40, 4e9))


def test_resume_sample_and_eval(run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = json.loads(Path(run, "result.json").read_text())
    assert cli.main(["resume", "run"]) == 0
    assert f"{result['val_bits_per_byte']:.3f} bits per byte" in capsys.readouterr().out

    texts = []
    for arguments in ([], [], ["--seed", "1"], ["--prompt", "12 sheep", "--tokens", "5", "--temperature", "0"]):
        assert cli.main(["sample", "run", "--tokens", "40", *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[3].startswith("12 sheep")

    assert cli.main(["eval", "run", "--checkpoint", "last"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"step 6: {result['val_bits_per_byte']:.4f} bits per byte of held-out text (")
    assert f"5-gram    {result['ngram5_bits_per_byte']:.3f} bits per byte on the held-out text" in said


def test_output_that_cannot_show_a_character_is_no_failure(run, tmp_path, quick_peak, monkeypatch):
    run = Path(run).rename(tmp_path / os.fsdecode("Zoë-".encode() + b"\xff"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert cli.main(["sample", str(run), "--prompt", "Zoë", "--tokens", "3"]) == 0
    assert cli.main(["resume", str(run)]) == 0
    sys.stdout.flush()
    said = sys.stdout.buffer.getvalue()
    assert said.startswith(b"Zo?") and b"/Zo?-?: loss.png" in said


def test_dry_run_touches_nothing(text, tmp_path, monkeypatch, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert cli.main(["train", "--dry-run", "--data", text, "--device", "cpu", "--precision", "bf16"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^train +[\d,]+ documents, [\d,]+ bytes$", said, re.MULTILINE)
    assert re.search(r"^precision +bf16$", said, re.MULTILINE)
    assert re.search(r"^parameters  [\d,]{7,}$", said, re.MULTILINE)
    assert re.search(r"^work        [\d,]+ FLOPs per token, [\d.e+]+ per step$", said, re.MULTILINE)
    assert re.search(r"^memory      [\d,]+ MiB", said, re.MULTILINE)
    assert cli.main(["train", "--dry-run", "--data", text, "--minutes", "3", "--fit-width"]) == 0
    assert "as many steps as fit into 3 minutes, 192 wide or narrower, of 2,048 tokens" in capsys.readouterr().out
    assert list(empty.iterdir()) == []


def test_a_dry_run_refuses_what_the_run_would(text, run, tmp_path, capsys):
    Path(tmp_path, "short.txt").write_text(Path(text).read_text()[:2000])
    for arguments, sentence in [
        (["--data", "absent.txt"], "fastlm.data: absent.txt does not exist"),
        (["--data", f"{tmp_path}/short.txt"], "--block-size 256: the held-out text has only 202 tokens"),
        (["--data", text, "--tokenizer", "bpe", "--block-size", "1024"], "--block-size 1024: the held-out text has"),
        (["--data", text, "--out", run], f"{run} holds a run already"),
    ]:
        options = ["--tokenizer", "byte", *arguments, "--out", str(tmp_path / "new")]
        options = options[:-2] if "--out" in arguments else options
        said = [fails(capsys, ["train", *mode, *options], 2) for mode in (["--dry-run"], [])]
        assert said[0] == said[1] and sentence in said[0]
    assert cli.main(["train", "--dry-run", "--data", text, "--out", run, "--overwrite"]) == 0
    parameters = re.search(r"^parameters  ([\d,]+)$", capsys.readouterr().out, re.MULTILINE)[1]
    full = estimate(decide(PRESETS["tiny"]), PRESETS["tiny"].vocab_size).parameters
    assert 0 < int(parameters.replace(",", "")) < full  # the text gives fewer tokens than asked for


@pytest.mark.parametrize(("preset", "parameters"), [("tiny", 2e6), ("small", 12e6), ("gpt2", 124e6)])
def test_presets_have_the_size_they_are_named_for(preset, parameters):
    config = decide(PRESETS[preset])
    assert estimate(config, config.vocab_size).parameters == pytest.approx(parameters, rel=0.25)


def test_of_two_presets_the_last_one_holds(text, capsys):
    for arguments in (["--preset", "gpt2", "--preset", "small"], ["--preset=gpt2", "--n-layer", "6", "--preset=small"]):
        assert cli.main(["train", "--dry-run", "--data", text, "--device", "cpu", *arguments]) == 0
        said = capsys.readouterr().out
        shape = {name: re.search(rf"^{name} +(\S+)", said, re.MULTILINE)[1] for name in ("preset", "n_layer", "n_embd")}
        assert shape == {"preset": "small", "n_layer": "6", "n_embd": "384"}


@pytest.mark.parametrize("preset", ["tiny", "small", "gpt2"])
def test_every_preset_takes_a_step(preset, text, tmp_path, quick_peak, capsys):
    shrunk = "--n-embd 48 --block-size 32 --batch-size 2 --accumulation 2 --steps 1 --vocab-size 300 --sample-tokens 4"
    out = str(tmp_path / preset)
    arguments = ["train", f"--preset={preset}", "--data", text, "--out", out, "--threads", "1", *shrunk.split()]
    assert cli.main(arguments) == 0
    config = json.loads(Path(out, "config.json").read_text())["config"]
    assert (
        config["preset"] == preset and config["device"] in ("cpu", "cuda") and config["precision"] in ("fp32", "bf16")
    )


def test_a_time_limit_decides_the_steps_once(text, tmp_path, quick_peak, monkeypatch, capsys):
    out, small = tmp_path / "run", [option for option in SMALL if option not in ("--steps", "6")]
    assert cli.main(["train", "--data", text, "--out", str(out), *small, "--minutes", "0.4"]) == 0
    steps = json.loads((out / "config.json").read_text())["config"]["steps"]
    said = capsys.readouterr().out
    assert f"0.4 minutes: {steps:,} steps of 64 tokens" in said
    assert f"\n{steps:,}/{steps:,}  loss" in said
    assert json.loads((out / "result.json").read_text())["step"] <= steps
    arguments = ["train", "--data", text, "--out", str(tmp_path / "none"), *small, "--minutes", "0.4"]
    monkeypatch.setattr(sys, "argv", ["fastlm", *arguments])
    monkeypatch.setattr(cli, "_seconds_alive", lambda: 300.0)
    assert re.search("--minutes 0.4 leaves no time for a step: preparing took 3[0-9]{2} s", fails(capsys, arguments, 2))
    assert not (tmp_path / "none" / "checkpoints").exists()


def test_time_counts_from_the_start_of_the_process(monkeypatch):
    code = (
        "import sys, time; sys.path[:] = sys.argv[1:]; time.sleep(1.5); from fastlm import cli;"
        " print(cli._seconds_alive())"
    )
    began = time.perf_counter()
    alive = float(subprocess.check_output([sys.executable, "-c", code, *map(os.path.abspath, sys.path)]))
    assert (1.4 if sys.platform == "linux" else 0) < alive < time.perf_counter() - began + 0.05

    monkeypatch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    assert 0 < cli._seconds_alive() <= time.process_time()


def test_mistakes_are_one_sentence_and_exit_code_2(run, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes("Zoë\n".encode("latin-1") * 100)
    for arguments, sentence in [
        (["fly"], "there is no command 'fly'; expected one of train, resume, sample, eval, bench, info"),
        (["info", "now"], "`fastlm info` takes no arguments, got now"),
        (["train", "--preset", "huge"], "--preset must be one of tiny, small, gpt2, got 'huge'"),
        (["resume", "nowhere"], "nowhere holds no run: there is no such directory"),
        (["sample", "nowhere"], "nowhere holds no run: there is no config.json in it"),
        (
            ["train", "--steps=6", "--minutes", "1"],
            "--steps and --minutes both set the length of the run; give one of them",
        ),
        (
            ["train", "--tokenizer", "byte", "--vocab_size", "300"],
            "--vocab-size is of a bpe tokenizer; bytes have 257 tokens",
        ),
        (["sample", "run", "--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["sample", "run", "--temperature", "inf"], "--temperature must be at least 0 and finite, got inf"),
        (
            ["train", "--data", text, "--out", "run", *SMALL],
            "run holds a run already; go on with it by `fastlm resume run`, replace it with --overwrite,"
            " or give another --out",
        ),
        (
            ["train", "--data", "absent.txt", "--out", "a", *SMALL],
            "fastlm.data: absent.txt does not exist; expected 'stdlib', a text file or a directory",
        ),
        (["train", "--data", "empty.txt", "--out", "a", *SMALL], "fastlm.data: empty.txt is empty"),
    ]:
        assert fails(capsys, arguments, 2) == f"fastlm: {sentence}\n", arguments
    assert "latin.txt is not UTF-8: byte 0xeb at offset 2" in fails(
        capsys, ["train", "--data", "latin.txt", "--out", "a", *SMALL], 2
    )
    assert "the held-out text has only" in fails(
        capsys, ["train", "--data", text, "--out", "b", *SMALL, "--block-size", "5000"], 2
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--vocab-size", "10"], "--vocab-size must be in 257 .. 2**24 for bpe, got 10"),
        (["--dropout", "1"], "GPTConfig: dropout must be in [0, 1), got 1.0"),
        (["--n-embd", "100"], "GPTConfig: n_embd must be a multiple of 2 * n_head"),
        (["--stepz", "1"], "--steps"),
        (["--minutes", "soon"], "--minutes"),
        (["--minutes", "inf"], "--minutes must be a finite number, got inf"),
        (["--learning-rate", "inf"], "--learning-rate must be a finite number, got inf"),
        (["--weight-decay", "nan"], "--weight-decay must be a finite number, got nan"),
    ],
)
def test_options_that_cannot_be_are_named_with_exit_code_2(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["train", *arguments])
    assert exit.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert sentence in said and "Traceback" not in said


def test_failures_are_one_sentence_and_exit_code_1(run, tmp_path, capsys, monkeypatch):
    for path in Path(run, "checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"")
    message = fails(capsys, ["sample", run], 1)
    assert re.fullmatch(r"(warning: .*\n)?fastlm: no checkpoint in .* can be read: .* is corrupted: .*\n", message)

    def no_rich(name, *rest, real=__import__, **keywords):
        if name.split(".")[0] == "tyro":
            raise ModuleNotFoundError("No module named 'tyro'", name="tyro")
        return real(name, *rest, **keywords)

    monkeypatch.setattr("builtins.__import__", no_rich)
    assert (
        fails(capsys, ["eval", run], 1) == "fastlm: `fastlm eval` needs the package tyro; pip install 'fastlm[train]'\n"
    )


def test_a_full_disk_is_one_sentence(text, tmp_path, quick_peak, capsys, monkeypatch):
    write = os.write

    def full(descriptor, content):
        if len(content) > 3000:
            raise OSError(28, "No space left on device")
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", full)
    said = fails(capsys, ["train", "--data", text, "--out", str(tmp_path / "run"), *SMALL], 1)
    assert re.fullmatch(r"fastlm: fastlm\.data: .* could not be written: No space left on device\n", said)


def test_info_names_every_part(capsys):
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    rows = [re.split(r"  +", line.strip(), maxsplit=1) for line in said.splitlines()]
    assert ["fastlm", fastlm.__version__] in rows
    assert {"python", "torch", "_cpu", "_cuda", "CUDA", "Triton"} <= {name for name, _ in rows}
    listed = [text for name, text in rows if name == "backends"]
    ops = [text.split(", ") for name, text in rows if name == "of"]
    for op, statuses in fastlm.backends().items():
        (text,) = (text for text, alike in zip(listed, ops, strict=True) if op in alike)
        assert all(s.backend in text and (s.usable or s.reason in text) for s in statuses)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "loaded; attention on the kernels of sm80"),
        ("", "loaded; attention on the kernels of sm80"),
        ("sm90", "loaded; attention on the kernels of sm90, where they were built and can"),
        ("sm91", "loaded; attention in 16 bits does not run: FASTLM_CUDA_FAMILY must be sm80 or sm90, got sm91"),
    ],
)
def test_info_names_the_family_of_cuda_kernels(capsys, monkeypatch, given, said):
    fastlm.backends()  # the kernels' wrappers are imported with the module that there really is
    monkeypatch.setattr(_native, "cuda", object())
    monkeypatch.delenv("FASTLM_CUDA_FAMILY", raising=False)
    if given is not None:
        monkeypatch.setenv("FASTLM_CUDA_FAMILY", given)
    assert cli.main(["info"]) == 0
    assert re.search(f"^_cuda +{re.escape(said)}$", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.setattr(_native, "cuda", None)
    monkeypatch.setitem(_native.reasons, "cuda", "not built")
    assert cli.main(["info"]) == 0
    assert "kernels of" not in capsys.readouterr().out


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0 and cli.main([]) == 0 and cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"fastlm {fastlm.__version__}\nusage: fastlm COMMAND")
    assert all(f"  {name:<8}" in said for name in cli.COMMANDS)


def test_from_another_directory_and_without_the_extras(tmp_path):
    """`fastlm info` needs torch alone: with the packages of the extras hidden it says the same."""
    code = (
        "import sys; sys.path[:] = sys.argv[1:]\n"
        "class Hidden:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] in ('tyro', 'rich', 'matplotlib', 'safetensors', 'tokenizers'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from fastlm.cli import main\n"
        "sys.exit(main(['info']) or main(['train']) - 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(os.path.abspath, sys.path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "fastlm" in done.stdout and fastlm.__version__ in done.stdout
    assert "fastlm: `fastlm train` needs the package tyro; pip install 'fastlm[train]'" in done.stderr
