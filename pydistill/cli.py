# SPDX-License-Identifier: Apache-2.0
"""``pydistill``: parses a command line, calls the library, prints. Heavy imports happen inside the subcommands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydistill.config import UserError, find_recipe, known_keys, load_section, parse_overrides, read_yaml, schema_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WELCOME = """\
pydistill: distil a Transformer into a small, fast student.

  pydistill run bilstm-demo              everything once, on packaged data, in minutes
  pydistill run RECIPE [--key value]     run a recipe or your own yaml; any key can be overridden
  pydistill plan RECIPE [--key value]    what that run would do; refuses what cannot work
  pydistill recipes                      the built-in recipes
  pydistill predict FOLDER "text" ...    try a finished model; of several tasks: --task NAME
  pydistill export FOLDER OUT --task NAME    one task of a model of several, as a plain classifier
  pydistill evaluate TASKS --model FOLDER    fine-tune and score an encoder on labelled tasks, over several seeds
  pydistill report FOLDER                draw the report of a finished run again
  pydistill augment IN OUT --text-columns sentence    write synthetic sentences
  pydistill vocab CORPUS OUT --teacher MODEL    train a small vocabulary for a student
  pydistill cache FOLDER --teacher MODEL --corpus FILES --signals ...    run a teacher once, for any number of students
  pydistill bench LOSS                   time the kernels against eager and compiled PyTorch
  pydistill env                          what is installed and which kernels are used

`pydistill COMMAND --help` says more. Errors of use exit with status 2.
"""

RUN_HELP = """\
usage: pydistill {command} RECIPE_OR_YAML [--key value ...] [--resume | --overwrite]

  RECIPE_OR_YAML     a name of `pydistill recipes`, or a yaml file
  --key value ...    override one key, e.g. --train.learning_rate 1e-3 --seeds 1 2 3 --teacher.fine_tune null
  --resume           continue the run in the output folder; what is finished is kept
  --overwrite        replace the run in the output folder
  --keys             list the recipe's keys and stop

A train block is transformers.TrainingArguments: every name of it works as --train.NAME.
"""

EVALUATE_HELP = """\
usage: pydistill evaluate [TASKS.yaml] --model FOLDER ... --output FOLDER [--seeds 1 2 3] [--key value ...]

  One task needs no yaml: --tasks.NAME.data.train train.tsv --tasks.NAME.data.text_columns sentence
  TASKS.yaml         the tasks; one of them, with everything that it can say:
                       tasks:
                         sst2:
                           data: {train: sst2/train.tsv, dev: sst2/dev.tsv, max_train_rows: 8000}
                           metric: accuracy        # f1, matthews, pearson, spearman, pearson_spearman
                           train: {num_train_epochs: 3}
                       train: {learning_rate: 5.0e-5}     # of all tasks
  --model FOLDER     encoders: folders, hub names or package:NAME/FOLDER, one or several
  --key value ...    override one key, e.g. --tasks.sst2.data.max_train_rows 100 --train.learning_rate 1e-4
  --keys             list the known keys and stop

A train block is transformers.TrainingArguments. What is finished in the output folder is not done again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for a result that is bad, 2 for an error of use."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(WELCOME, end="")
        return 0
    if words[0] in ("-h", "--help", "help"):
        print(WELCOME, end="")
        return 0
    if words[0] == "--version":
        from pydistill import __version__

        print(f"pydistill {__version__}")
        return 0
    command = COMMANDS.get(words[0])
    try:
        if command is None:
            from pydistill.config import near_matches

            near = near_matches(words[0], COMMANDS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"there is no command {words[0]!r}{hint} The commands are: {', '.join(COMMANDS)}")
        return command(words[1:])
    except UserError as error:
        return _complain(error)
    except KeyboardInterrupt:
        print("pydistill: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone; point stdout elsewhere so that the interpreter's own flush stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _complain(error: BaseException) -> int:
    lines = str(error).splitlines()
    if len(lines) == 1:
        print(f"pydistill: {lines[0]}", file=sys.stderr)
    else:
        print(f"pydistill: {len(lines)} problems", *(f"  - {line}" for line in lines), sep="\n", file=sys.stderr)
    return 2


def _run_words(words: list[str], command: str) -> tuple[str, dict[str, object], bool, bool] | None:
    """Split the words of ``run`` and ``plan``; None when help or the keys were asked for and printed."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(RUN_HELP.format(command=command), end="")
        if not words:
            raise UserError(f"{command}: name a recipe or a yaml file, e.g. pydistill {command} bilstm-demo")
        return None
    if "--keys" in words:
        named = [word for word in words if not word.startswith("-")]
        recipe = read_yaml(find_recipe(named[0])).get("recipe") if named else None
        print("\n".join(known_keys(schema_of(recipe))))
        return None
    if words[0].startswith("-"):
        raise UserError(f"{command}: the recipe or yaml file comes first, got {words[0]!r}")
    switches = [word for word in words[1:] if word in ("--resume", "--overwrite")]
    if len(set(switches)) > 1:
        raise UserError(f"{command}: --resume and --overwrite exclude each other")
    overrides = parse_overrides([word for word in words[1:] if word not in ("--resume", "--overwrite")])
    return words[0], overrides, "--resume" in switches, "--overwrite" in switches


def run_command(words: list[str]) -> int:
    """``pydistill run``: plan and carry out."""
    parsed = _run_words(words, "run")
    if parsed is None:
        return 0
    source, overrides, resume, overwrite = parsed
    from pydistill.recipes import run

    try:
        run(source, overrides, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        print("\npydistill: interrupted; the same command with --resume goes on from here", file=sys.stderr)
        return 130
    return 0


def plan_command(words: list[str]) -> int:
    """``pydistill plan``: check and print, without working."""
    parsed = _run_words(words, "plan")
    if parsed is None:
        return 0
    source, overrides, resume, overwrite = parsed
    from pydistill.plan import plan

    print(plan(source, overrides, resume=resume, overwrite=overwrite))
    return 0


def recipes_command(words: list[str]) -> int:
    """``pydistill recipes``: names and descriptions."""
    argparse.ArgumentParser(prog="pydistill recipes", description="List the built-in recipes.").parse_args(words)
    from pydistill.config import RECIPES_FOLDER
    from pydistill.recipes import available

    recipes = available()
    width = max(map(len, recipes))
    for name, description in recipes.items():
        print(f"{name:<{width}}  {description}")
    print(f"\nTheir files, to copy and change: {RECIPES_FOLDER}")
    return 0


def env_command(words: list[str]) -> int:
    """``pydistill env``: versions, and the kernels that would run."""
    argparse.ArgumentParser(prog="pydistill env", description="Show versions and kernels.").parse_args(words)
    from pydistill._dispatch import environment

    report = environment()
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name:<{width}}  {value}")
    return 0


def bench_command(words: list[str]) -> int:
    """``pydistill bench``: hand the words on."""
    from pydistill.bench import main as bench

    return bench(words)


def augment_command(words: list[str]) -> int:
    """``pydistill augment``: a file of rows in, a file of synthetic rows out."""
    from pydistill.data.augment import AugmentConfig, augment_file

    defaults = AugmentConfig()
    parser = argparse.ArgumentParser(
        prog="pydistill augment",
        description="Write synthetic sentences for a teacher to label (Tang et al. 2019).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("input", type=Path, help="training rows: .tsv, .csv, .json or .jsonl")
    parser.add_argument("output", type=Path, help="file to write; its suffix says the format")
    parser.add_argument("--text-columns", nargs="+", required=True, metavar="NAME", help="one column, or two for pairs")
    for option in fields(AugmentConfig):
        default = getattr(defaults, option.name)
        name = f"--{option.name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help="rule switch")
        else:
            parser.add_argument(name, type=type(default), default=default, help=" ")
    parser.add_argument("--workers", type=int, default=1, help="processes; the result does not depend on it")
    parser.add_argument("--overwrite", action="store_true", help="replace an output file that exists")
    options = vars(parser.parse_args(words))
    source, target, columns = options.pop("input"), options.pop("output"), options.pop("text_columns")
    workers, overwrite = options.pop("workers"), options.pop("overwrite")
    try:
        config = AugmentConfig(**options)
        counts = augment_file(source, target, columns, config, num_proc=workers, overwrite=overwrite)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
    print(f"{target}: {', '.join(f'{name} {count:,}' for name, count in asdict(counts).items())}")
    return 0


def vocab_command(words: list[str]) -> int:
    """``pydistill vocab``: texts in, a folder with a tokenizer out."""
    parser = argparse.ArgumentParser(
        prog="pydistill vocab",
        description="Train a WordPiece vocabulary for a student, with its teacher's words and special tokens.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("corpus", nargs="+", help="one text per line; .jsonl, .csv, .parquet: per row; or patterns")
    parser.add_argument("output", type=Path, help="folder to write, for AutoTokenizer")
    parser.add_argument("--teacher", required=True, help="whose tokenizer it follows: folder, hub name or package:")
    parser.add_argument("--size", type=int, default=4928, help="pieces, special tokens included")
    parser.add_argument("--text-column", default="text", help="of files with columns")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that holds a tokenizer")
    options = parser.parse_args(words)
    from pydistill.data.corpus import CorpusSection
    from pydistill.data.vocabulary import write_vocabulary

    teacher = _tokenizer_of("vocab", options.teacher, "; name a model of the BERT family")
    tokenizer = write_vocabulary(
        CorpusSection(files=options.corpus, text_column=options.text_column),
        teacher,
        options.output,
        size=options.size,
        overwrite=options.overwrite,
        progress=sys.stderr.isatty(),
    )
    pieces, theirs = set(tokenizer.get_vocab()), set(teacher.get_vocab())
    shared = f"{len(pieces & theirs):,} of them among the teacher's {len(theirs):,}"
    print(f"{options.output}: {len(pieces):,} pieces, {shared}")
    return 0


def _tokenizer_of(command: str, teacher: str, hint: str = "") -> PreTrainedTokenizerBase:
    from pydistill.config import resolve_path
    from pydistill.inference import ModelError, load_tokenizer

    try:
        return load_tokenizer(resolve_path(teacher))
    except ModelError as error:
        raise UserError(f"{command}: --teacher: {error}{hint}") from None


def cache_command(words: list[str]) -> int:
    """``pydistill cache``: texts and a teacher in, its signals on disk."""
    parser = argparse.ArgumentParser(
        prog="pydistill cache",
        description="Run a teacher once over texts, and keep what students learn from; what is there stays.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="new, empty, or a cache of the same teacher and signals")
    parser.add_argument("--teacher", required=True, help="folder, hub name or package:")
    parser.add_argument(
        "--corpus", nargs="+", required=True, help="a text per line, or per row of .json, .jsonl, .csv, .tsv, .parquet"
    )
    parser.add_argument(
        "--text-columns", nargs="+", default=["text"], metavar="NAME", help="of files with rows: one, or two for pairs"
    )
    parser.add_argument("--max-length", type=int, default=128, help="tokens per text; as the students' runs have it")
    parser.add_argument("--signals", nargs="+", default=["logits"], help="logits, hidden_states@L, queries@L, ...")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="on disk")
    parser.add_argument("--task", help="of a teacher of several tasks: whose logits")
    parser.add_argument("--top-k", type=int, help="keep so many log-probabilities of each row of logits")
    parser.add_argument("--share", default="0/1", help="i/n: this is the i-th of n writers at the same time")
    parser.add_argument("--batch-size-tokens", type=int, default=4096, help="most tokens that run at a time")
    options = parser.parse_args(words)
    import torch
    import transformers

    from pydistill import students
    from pydistill.cache import tokenized, write_cache
    from pydistill.capture import LOGITS
    from pydistill.data.corpus import TextSource, corpus_rows
    from pydistill.inference import ModelError, select_task
    from pydistill.plan import load_model_config, quiet, resolve_model

    try:
        number, of = (int(part) for part in options.share.split("/"))
    except ValueError:
        raise UserError(f"cache: --share must be i/n, such as 0/4, got {options.share!r}") from None
    if len(options.text_columns) > 2:
        raise UserError(f"cache: --text-columns must name one column or two, got {', '.join(options.text_columns)}")
    if options.task is not None and LOGITS not in options.signals:
        raise UserError(f"cache: --task says whose logits, and --signals has none, got {', '.join(options.signals)}")
    teacher = resolve_model(options.teacher, "--teacher")
    loader: Any = transformers.AutoModel
    if LOGITS in options.signals:
        # The class that the model's own configuration names: it knows what the head is for.
        (name,) = (load_model_config(teacher).architectures or [""])[:1]
        loader = getattr(transformers, name, getattr(students, name, None))
        if loader is None:
            raise UserError(
                f"cache: --teacher: {options.teacher} is of the class {name!r}, which transformers does not have; use "
                "pydistill.cache.write_cache with the model itself"
            )
    tokenizer = _tokenizer_of("cache", options.teacher)
    texts = corpus_rows(TextSource(files=options.corpus), options.text_columns)
    try:
        with quiet():
            model = loader.from_pretrained(teacher, dtype=torch.float32)
        if LOGITS in options.signals:
            select_task(model.config, options.teacher, options.task)
    except ModelError as error:
        raise UserError(f"cache: --teacher: {error}") from None
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        done = write_cache(
            tokenized(texts, tokenizer, options.max_length), model, options.signals, options.folder,
            tokenizer=tokenizer, dtype=options.dtype, top_k=options.top_k, share=(number, of),
            batch_size_tokens=options.batch_size_tokens, progress=sys.stderr.isatty(),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"cache: {error}") from None
    pace = f"{done.tokens / done.seconds:,.0f} tokens/s" if done.computed else "nothing to do"
    print(
        f"{options.folder}: {done.examples:,} texts, {done.computed:,} of them new: {done.tokens:,} tokens, "
        f"{done.bytes / 1e6:,.1f} MB, {done.seconds:.1f} s, {pace}"
    )
    return 0


def predict_command(words: list[str]) -> int:
    """``pydistill predict``: classify texts from the command line or from standard input."""
    parser = argparse.ArgumentParser(
        prog="pydistill predict",
        description="Classify texts with a finished student (or any sequence classifier in a folder).",
    )
    parser.add_argument("model", help="folder with config.json and model.safetensors")
    parser.add_argument("texts", nargs="*", help="one per word; - or none: one per line of standard input")
    parser.add_argument("--pair", action="store_true", help="texts two by two (on standard input: tab separated)")
    parser.add_argument("--task", help="of a model of several tasks")
    parser.add_argument("--max-length", type=int, default=128, help="tokens kept per text (default: %(default)s)")
    options = parser.parse_intermixed_args(words)
    if options.max_length < 1:
        raise UserError(f"predict: --max-length must be at least 1, got {options.max_length}")
    _silence_transformers()
    from pydistill.inference import class_names, load_classifier, predict_logits

    model, tokenizer = load_classifier(options.model, options.task)
    pair = options.pair or getattr(model.config, "pair", False)
    rows = _rows(options.texts, pair)
    logits = predict_logits(model, tokenizer, rows, options.max_length)
    if logits.size(1) == 1:
        for row, score in zip(rows, logits[:, 0].tolist(), strict=True):
            print(f"{score:8.3f}  {' | '.join(row)}")
        return 0
    probabilities = logits.softmax(-1)
    names = class_names(model.config)
    width = max(map(len, names))
    for row, values in zip(rows, probabilities, strict=True):
        best = int(values.argmax())
        print(f"{names[best]:<{width}}  {values[best]:6.1%}  {' | '.join(row)}")
    return 0


def export_command(words: list[str]) -> int:
    """``pydistill export``: one task of a model of several, as a plain classifier."""
    parser = argparse.ArgumentParser(
        prog="pydistill export",
        description="Write one task of a model of several tasks as a plain sequence classifier of its encoder's kind.",
    )
    parser.add_argument("model", help="folder of a finished model of several tasks")
    parser.add_argument("output", type=Path, help="folder to write, for AutoModelForSequenceClassification")
    parser.add_argument("--task", required=True, help="which one")
    options = parser.parse_args(words)
    _silence_transformers()
    from pydistill.inference import load_classifier

    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise UserError(f"export: {options.output} is there already; name a folder that is new or empty")
    model, tokenizer = load_classifier(options.model, options.task)
    classifier = getattr(model, "classifier", None)
    if not hasattr(model.config, "tasks") or classifier is None:
        raise UserError(f"export: {options.model} is a model of one task already")
    try:
        plain = classifier(options.task)
    except ValueError as error:
        raise UserError(f"export: {error}") from None
    plain.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"{options.output}: {type(plain).__name__}, {', '.join(plain.config.id2label.values())}")
    return 0


def evaluate_command(words: list[str]) -> int:
    """``pydistill evaluate``: fine-tune and score encoders on tasks."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(EVALUATE_HELP, end="")
        if not words:
            raise UserError("evaluate: name a yaml file with tasks")
        return 0
    from pydistill.evaluate import EvaluateConfig, evaluate

    if "--keys" in words:
        print("\n".join(known_keys(EvaluateConfig)))
        return 0
    path = None if words[0].startswith("-") else Path(words[0]).expanduser()
    evaluate(load_section(EvaluateConfig, path, parse_overrides(words if path is None else words[1:])))
    return 0


def _rows(texts: list[str], pair: bool) -> list[tuple[str, ...]]:
    if not texts or texts == ["-"]:
        lines = [line.rstrip("\n") for line in sys.stdin if line.strip()]
        rows: list[tuple[str, ...]] = [tuple(line.split("\t")) if pair else (line,) for line in lines]
        for number, row in enumerate(rows, 1):
            if pair and len(row) != 2:
                raise UserError(f"predict: line {number} must hold two texts with a tab between them, got {len(row)}")
    elif pair:
        if len(texts) % 2:
            raise UserError(f"predict: a model of pairs needs the texts two by two, got {len(texts)}")
        rows = list(zip(texts[::2], texts[1::2], strict=True))
    else:
        rows = [(text,) for text in texts]
    if not rows:
        raise UserError("predict: no text given")
    return rows


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def report_command(words: list[str]) -> int:
    """``pydistill report``: table, pictures and page of a finished run, again."""
    parser = argparse.ArgumentParser(prog="pydistill report", description="Draw the report of a finished run again.")
    parser.add_argument("folder", type=Path, help="the output folder of a run")
    folder = parser.parse_args(words).folder
    from pydistill.recipes import report
    from pydistill.report import text_table

    path, shown = report(folder)
    print(text_table(shown.table))
    print(f"report: {path}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run_command,
    "plan": plan_command,
    "recipes": recipes_command,
    "env": env_command,
    "bench": bench_command,
    "augment": augment_command,
    "vocab": vocab_command,
    "cache": cache_command,
    "predict": predict_command,
    "export": export_command,
    "evaluate": evaluate_command,
    "report": report_command,
}


if __name__ == "__main__":
    sys.exit(main())
