"""The commands of data: prepare, regenerate, cache."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.log import info
from specforge_lite.core.sections import DataSection, TargetPathSection
from specforge_lite.core.settings import Section, flag, parse_config
from specforge_lite.regenerate.settings import RegenerateConfig

if TYPE_CHECKING:
    from specforge_lite.data.store import TokenizedDataset


PREPARE_HELP = """\
Turn a data set into the normal form: `python scripts/prepare_data.py --dataset sharegpt --output-path cache/data`.

`--dataset` is a data set of the hub by name (sharegpt, ultrachat, gsm8k, alpaca, magpie, perfectblend, opc; with
`--data-path` from a local copy), `gsm8k-sample` (shipped with the package), `fim` with `--source-dir DIR` (holes cut
out of source code), or a local file or directory.
"""
REGENERATE_HELP = """\
Replace the answers in a data set by the target's own.

A draft learns to predict what ITS target says, so it should be trained on the target's answers. Any number of
OpenAI-compatible servers, or transformers in this process:

  python scripts/generate_data_by_target.py --model-name Qwen/Qwen3-8B --raw-data-file train.jsonl \\
      --output-dir outputs/regenerated --server-address-port 127.0.0.1:30000 127.0.0.1:30001 --max-concurrency 128
  python scripts/generate_data_by_target.py --target-backend hf --model-name specforge_lite/assets/tiny_target \\
      --raw-data-file train.jsonl --output-dir outputs/regenerated --output-file outputs/train.jsonl --max-tokens 160
"""
CACHE_HELP = """\
Tokenize conversations (or fill-in-the-middle rows) once, and count the draft vocabulary.

    python scripts/build_eagle3_dataset_cache.py --target-model-path MODEL --train-data-path FILE --view-train-data 0 1

Training builds the same cache when it is missing; this script does it beforehand, with `--num-proc` processes, and
shows samples: trained tokens green, masked ones red (`--view-html FILE` writes them as a page).
"""


class PrepareConfig(Section):
    """What to read and what to write."""

    dataset: str = flag(..., "name of a data set, or PATH of a file or directory")
    output_path: Path = flag(Path("cache/dataset"), "directory, or a file name ending in .jsonl")
    data_path: Path | None = flag(None, "local copy of a named data set; nothing is downloaded")
    data_format: Literal["auto", "chat", "fim"] = flag("auto", "refuse rows of the other format")
    sample_size: int | None = flag(None, "rows to draw at random; default: all", ge=1)
    split_eval: float = flag(0.0, "share of rows (for code: of files) kept for evaluation", ge=0, lt=1)
    seed: int = flag(0, "decides sample, split and holes", ge=0)
    source_dir: Path | None = flag(None, "directory of source code for --dataset fim")
    exclude_dirs: tuple[str, ...] = flag(
        ("site-packages", "node_modules"), "names of directories below it to pass over"
    )
    rows_per_file: int = flag(4, "at most so many holes per source file", ge=1)
    max_context_chars: int = flag(6000, "characters kept before and after a hole", ge=100)


def prepare() -> None:
    config = parse_config(PrepareConfig, description=PREPARE_HELP)
    from specforge_lite.data.fim_source import FimSourceOptions
    from specforge_lite.data.prepare import PrepareOptions, output_files, prepare
    from specforge_lite.data.sources import choose_source

    fim = FimSourceOptions(
        config.rows_per_file, config.max_context_chars, seed=config.seed, exclude_dirs=config.exclude_dirs
    )
    source = choose_source(config.dataset, config.data_path, config.source_dir, fim)
    files = output_files(config.output_path, source, config.split_eval > 0)
    options = PrepareOptions(config.sample_size, config.split_eval, config.seed, config.data_format)
    report = prepare(source, files, options)
    info(f"{source}: {report.summary()}")
    info(f"training data: {files.train}")
    if config.split_eval:
        info(f"evaluation data: {files.evaluation}")
    if report.rejected:
        info(f"what was left out, and why: {files.rejected}")


def regenerate() -> int:
    config = parse_config(RegenerateConfig, description=REGENERATE_HELP)
    from specforge_lite.regenerate.run import run

    return 128 + signal.SIGTERM if run(config).stopped else 0


class ModelSection(TargetPathSection):
    """Whose tokenizer, and which draft."""

    draft_model_config: Path | None = flag(None, "config.json of the draft, for its vocabulary size")
    draft_vocab_size: int | None = flag(None, "default: the draft config's, else at most 32000", ge=1)


class ViewSection(Section):
    """What to show."""

    view_train_data: tuple[int, ...] = flag((), "numbers of training samples to show, from 0")
    view_html: Path | None = flag(None, "write the shown samples to this file instead")


class CacheConfig(Section):
    """Everything this script takes."""

    model: ModelSection
    data: DataSection = DataSection()
    view: ViewSection = ViewSection()


def cache() -> None:
    config = parse_config(CacheConfig, description=CACHE_HELP)
    if config.data.train_data_path is None:
        raise ConfigError("data.train_data_path: required (flag --train-data-path)")
    from specforge_lite.core.hub import load_config, load_tokenizer
    from specforge_lite.data.cache import open_or_build_dataset
    from specforge_lite.data.vocab import open_or_build_vocab_map

    target_config = load_config(config.model.target_model_path, config.model.trust_remote_code)
    vocab_size = int(target_config.get_text_config().vocab_size)
    draft_vocab_size = choose_draft_vocab_size(config.model, target_config)
    tokenizer = load_tokenizer(config.model.target_model_path, config.model.trust_remote_code)
    train = open_or_build_dataset(config.data.train_data_path, tokenizer, config.data)
    if config.data.eval_data_path is not None:
        open_or_build_dataset(config.data.eval_data_path, tokenizer, config.data)
    if config.model.draft_model_config is not None:
        from specforge_lite.model.config_json import config_from_file

        train.warn_beyond(config_from_file(config.model.draft_model_config).max_position_embeddings)
    open_or_build_vocab_map(train, draft_vocab_size, vocab_size, config.data.cache_dir)
    show(config.view, train, tokenizer)


def choose_draft_vocab_size(section: ModelSection, target_config: Any) -> int:
    """From the flag, the draft's config.json, or as many as a derived draft has."""
    vocab_size = int(target_config.get_text_config().vocab_size)
    if section.draft_vocab_size is not None:
        return section.draft_vocab_size
    if section.draft_model_config is None:
        return min(32000, vocab_size)
    from specforge_lite.checkpoints.draft_files import read_draft_config

    draft = read_draft_config(section.draft_model_config, None, target_config)
    if draft.vocab_size != vocab_size:
        raise ConfigError(f"{section.draft_model_config}: vocab_size {draft.vocab_size}, the target has {vocab_size}")
    return draft.draft_vocab_size


def show(section: ViewSection, train: TokenizedDataset, tokenizer: Any) -> None:
    """Print the chosen samples, or write them as HTML (the first two where none were chosen)."""
    from specforge_lite.data.view import print_samples, write_html

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    if section.view_html is not None:
        indices = section.view_train_data or tuple(range(min(2, len(train))))
        write_html(train, indices, decode, section.view_html)
        info(f"wrote {len(indices)} samples to {section.view_html}")
    elif section.view_train_data:
        print_samples(train, section.view_train_data, decode)
