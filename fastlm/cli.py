"""The command `fastlm`: train, resume, sample, eval, bench, info.

Exit codes: 0 done, 1 the work failed, 2 what was given cannot be used, 128 + n stopped by signal n. An expected failure
is one sentence on stderr. Each command imports what it needs when it runs, so that `fastlm info` works wherever torch
does.
"""

# No `from __future__ import annotations`: tyro reads the annotations of options declared inside functions.
import dataclasses
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):  # what the terminal cannot show must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        from fastlm._version import __version__

        print(f"fastlm {__version__}")
        return 0
    if name not in COMMANDS:
        return _fail(2, f"there is no command {name!r}; expected one of {', '.join(COMMANDS)}")
    try:
        return COMMANDS[name](rest)
    except (ValueError, FileNotFoundError) as error:
        return _fail(2, error)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] in _EXTRAS:
            return _fail(1, f"`fastlm {name}` needs the package {error.name}; pip install 'fastlm[train]'")
        raise
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _fail(1, error.strerror if error.filename is None and error.strerror else error)
    except KeyboardInterrupt:
        return _fail(128 + signal.SIGINT, "interrupted")
    except Exception as error:
        if _is_expected(error):
            return _fail(1, error)
        raise


_EXTRAS = ("matplotlib", "numpy", "rich", "safetensors", "tokenizers", "tyro")


def _is_expected(error: Exception) -> bool:
    """Whether the error's message is written for the user. Only a command that got as far as torch can raise one."""
    import torch

    expected: tuple[type[Exception], ...] = (torch.OutOfMemoryError, NotImplementedError)
    if "fastlm.train" in sys.modules:
        from fastlm.train import CheckpointError, TrainingError

        expected = (*expected, CheckpointError, TrainingError)
    return isinstance(error, expected)


def train(arguments: list[str]) -> int:
    """Train a GPT on text."""
    import tyro

    from fastlm.train import PRESETS, TrainConfig
    from fastlm.train import train as start

    preset = _value_of("--preset", arguments) or "tiny"
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")

    @dataclasses.dataclass
    class Options:
        config: tyro.conf.OmitArgPrefixes[TrainConfig]
        dry_run: bool = False
        """Read the text, print the resolved configuration and what the run costs, and leave; nothing is written."""
        overwrite: bool = False
        """Replace the run that --out holds."""

    options = _parse(Options, "train", arguments, default=Options(PRESETS[preset]))
    given = {name.replace("_", "-").partition("=")[0] for name in arguments}
    if "--steps" in given and options.config.minutes is not None:
        raise ValueError("--steps and --minutes both set the length of the run; give one of them")
    if "--vocab-size" in given and options.config.tokenizer == "byte":
        raise ValueError("--vocab-size is of a bpe tokenizer; bytes have 257 tokens")
    if options.dry_run:
        return _dry_run(options.config, options.overwrite)
    spent = _seconds_alive() if sys.argv[2:] == arguments else 0.0  # a program that calls this has done other work too
    return _report(start(options.config, _progress(), peak=_peak, spent=spent, overwrite=options.overwrite))


def resume(arguments: list[str]) -> int:
    """Go on with a run that was stopped."""
    import tyro

    from fastlm.train import resume as go_on

    @dataclasses.dataclass
    class Options:
        run: tyro.conf.Positional[str]
        """Directory of the run."""

    options = _parse(Options, "resume", arguments)
    return _report(go_on(options.run, _progress(), peak=_peak))


def sample(arguments: list[str]) -> int:
    """Write text with a trained model."""
    import tyro

    from fastlm.train import load_model, stream_text

    @dataclasses.dataclass
    class Options:
        run: tyro.conf.Positional[str]
        """Directory of the run."""
        prompt: str = ""
        """Beginning of the text."""
        tokens: int = 256
        """Tokens to add at most."""
        temperature: float = 0.6
        """0 takes the likeliest token, 1 draws from the model as it is."""
        top_k: int = 50
        """Draw from so many likeliest tokens; 0 from all."""
        seed: int = 0
        checkpoint: Literal["best", "last"] = "best"

    options = _parse(Options, "sample", arguments)
    if options.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {options.tokens}")
    if options.top_k < 0:
        raise ValueError(f"--top-k must be at least 0, got {options.top_k}")
    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"--temperature must be at least 0 and finite, got {options.temperature}")
    loaded = load_model(options.run, options.checkpoint, _progress().warn)
    pieces = stream_text(
        loaded.model,
        loaded.config,
        loaded.dataset.tokenizer,
        options.prompt,
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k or None,
        seed=options.seed,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def evaluate(arguments: list[str]) -> int:
    """Measure a trained model on all of the held-out text."""
    import tyro

    from fastlm.train import evaluate as measure
    from fastlm.train import load_model, ngram_baseline

    @dataclasses.dataclass
    class Options:
        run: tyro.conf.Positional[str]
        """Directory of the run."""
        checkpoint: Literal["best", "last"] = "best"

    options = _parse(Options, "eval", arguments)
    progress = _progress()
    loaded = load_model(options.run, options.checkpoint, progress.warn)
    dataset = loaded.dataset
    result = measure(loaded.model, loaded.config, dataset.val, dataset.val_bytes)
    print(
        f"step {loaded.step:,}: {result.bits_per_byte:.4f} bits per byte of held-out text"
        f" ({result.nats_per_token:.4f} nats per token, {result.tokens:,} tokens, {dataset.val_bytes:,} bytes)"
    )
    ngram_baseline(dataset, progress)
    return 0


def bench(arguments: list[str]) -> int:
    """Time the ops and the training step beside torch's."""
    from fastlm.benchmarks import main as run_benchmarks

    return run_benchmarks(arguments) or 0


def info(arguments: list[str]) -> int:
    """Say what is installed, what runs, and why something does not."""
    if arguments:
        raise ValueError(f"`fastlm info` takes no arguments, got {' '.join(arguments)}")
    import torch

    import fastlm
    from fastlm import _native

    rows = [
        ("fastlm", fastlm.__version__),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    if _native.cpu is not None:
        usable, active = _native.cpu.usable_isas(), _native.cpu.active_isa()
        missing = [isa for isa in _native.cpu.compiled_isas() if isa not in usable]
        runs = f"{active} in use; this machine runs {', '.join(usable)}"
        runs += f", not {', '.join(missing)}" if missing else ""
        if "amx" in _native.cpu.compiled_isas():
            runs += "; the kernels for amx have run in an emulation of its tiles, not yet on a machine that has them"
        if not _native.cpu.threaded:
            runs += "; on one thread, since it was built without GCC's OpenMP"
        rows.append(("_cpu", runs))
    else:
        rows.append(("_cpu", f"missing: {_native.reasons['cpu']}"))
    loaded = f"loaded; {_cuda_family()}"
    rows.append(("_cuda", loaded if _native.cuda is not None else f"missing: {_native.reasons['cuda']}"))
    rows.append(("CUDA", _cuda_state(torch)))
    rows.append(("Triton", _triton_state()))
    alike: dict[str, list[str]] = {}  # the ops that have the same to say
    for op, statuses in fastlm.backends().items():
        listed = (s.backend if s.usable else f"{s.backend} not usable ({s.reason})" for s in statuses)
        alike.setdefault(", ".join(listed), []).append(op)
    for listed, ops in alike.items():
        rows += [("backends", listed), ("  of", ", ".join(ops))]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")
    return 0


def _cuda_family() -> str:
    """Which kernels attention takes. Whether sm90's were built is known only where they run."""
    family = os.environ.get("FASTLM_CUDA_FAMILY") or "sm80"
    if family not in ("sm80", "sm90"):
        return f"attention in 16 bits does not run: FASTLM_CUDA_FAMILY must be sm80 or sm90, got {family}"
    return f"attention on the kernels of {family}" + (", where they were built and can" if family == "sm90" else "")


def _cuda_state(torch: Any) -> str:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without it"
    if not torch.cuda.is_available():
        return f"torch is built for {torch.version.cuda} and sees no GPU"
    names = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"torch is built for {torch.version.cuda}: {', '.join(names)}"


def _triton_state() -> str:
    try:
        import triton
    except ImportError as error:
        return f"missing: {error}"
    return triton.__version__


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "resume": resume,
    "sample": sample,
    "eval": evaluate,
    "bench": bench,
    "info": info,
}


def _usage() -> str:
    rows = [f"  {name:<8}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: fastlm COMMAND [options]", "", *rows, "", "fastlm COMMAND --help lists the options."])


def _parse(options: type, command: str, arguments: list[str], **keywords: Any) -> Any:
    """The options as their dataclass. tyro explains a mistake on stderr and leaves with exit code 2."""
    import tyro

    return tyro.cli(
        options,
        prog=f"fastlm {command}",
        description=COMMANDS[command].__doc__,
        args=arguments,
        **keywords,
    )


def _value_of(option: str, arguments: list[str]) -> str | None:
    """The last value of `option`, as the parser takes it, read before the others since it decides their defaults."""
    value = None
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(option + "="):
            value = argument.removeprefix(option + "=")
    return value


def _progress() -> Any:
    from fastlm.train import ConsoleProgress

    return ConsoleProgress()


def _peak(config: Any) -> float:
    """What the machine can do in the run's precision, FLOP/s."""
    import torch

    from fastlm.benchmarks.limits import measure_peak

    return measure_peak(torch.bfloat16 if config.precision == "bf16" else torch.float32, device=config.device)


def _seconds_alive() -> float:
    """Of this process: importing torch from a cold disk takes many. Elsewhere than on Linux those of CPU time."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # from the third on, see proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.process_time()


# Bytes of training text up to which a dry run learns the tokenizer (a second). A longer text, taken for one that fills
# the vocabulary, has at most as many tokens as bytes and ends of documents.
_TOKENIZED_HERE = 1 << 20


def _dry_run(config: Any, overwrite: bool) -> int:
    from fastlm.data import BPETokenizer, load_corpus
    from fastlm.train.config import decide
    from fastlm.train.plan import estimate
    from fastlm.train.rundir import check_lengths, free_directory
    from fastlm.train.step import padded_vocab_size

    resolved = free_directory(decide(config), overwrite)
    corpus = load_corpus(config.data)  # what the run would refuse is refused here
    report, vocab_size = corpus.report, resolved.vocab_size if resolved.tokenizer == "bpe" else 257
    lengths = (report.train_bytes + report.train_documents + 1, report.val_bytes + report.val_documents + 1)
    if resolved.tokenizer == "bpe" and report.train_bytes <= _TOKENIZED_HERE:
        tokenizer = BPETokenizer.train(corpus.train, vocab_size)
        vocab_size = tokenizer.vocab_size
        lengths = tuple(len(tokenizer.encode_documents(part)) for part in (corpus.train, corpus.val))
    check_lengths(resolved, *lengths)
    cost = estimate(resolved, padded_vocab_size(vocab_size))
    width = max(len(field.name) for field in dataclasses.fields(resolved))
    for field in dataclasses.fields(resolved):
        value, given = getattr(resolved, field.name), getattr(config, field.name)
        print(f"{field.name:<{width}}  {value}" + (f"  (from {given})" if value != given else ""))
    steps = f"{resolved.steps:,} steps"
    if resolved.minutes is not None:
        steps = f"as many steps as fit into {resolved.minutes:g} minutes"
        steps += f", {resolved.n_embd} wide or narrower," if resolved.fit_width else ""
    print(f"\n{report}\n")
    print(f"parameters  {cost.parameters:,}")
    print(f"work        {cost.flops_per_token:,} FLOPs per token, {cost.flops_per_step:.4g} per step")
    print(f"length      {steps} of {resolved.tokens_per_step:,} tokens")
    print(f"memory      {cost.memory / 2**20:,.0f} MiB beyond the program and the text")
    return 0


def _report(result: Any) -> int:
    if result.stopped_by is not None:
        return 128 + signal.Signals[result.stopped_by]
    ngram = result.ngram_bits_per_byte
    if result.sample is not None:
        print(f"\n{result.sample}\n")
    if result.sample_words_known is not None:
        print(f"sample      {100 * result.sample_words_known:.0f} % of its words occur in the training text")
    beside = "" if ngram is None else f"; a 5-gram: {ngram:.3f}"
    print(f"held out    {result.evaluation.bits_per_byte:.3f} bits per byte{beside}")
    print(f"run         {result.out}: loss.png, metrics.jsonl, sample.txt, checkpoints")
    return 0


def _fail(code: int, message: object) -> int:
    print(f"fastlm: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
