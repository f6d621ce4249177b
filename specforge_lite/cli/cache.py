"""Tokenize conversations (or fill-in-the-middle rows) once, and count the draft vocabulary.

    python scripts/build_eagle3_dataset_cache.py --target-model-path MODEL --train-data-path FILE --view-train-data 0 1

Training builds the same cache when it is missing; this script does it beforehand, with `--num-proc` processes, and
shows samples: trained tokens green, masked ones red (`--view-html FILE` writes them as a page).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.log import info
from specforge_lite.core.sections import DataSection, TargetPathSection
from specforge_lite.core.settings import Section, parse_config

if TYPE_CHECKING:
    from specforge_lite.data.store import TokenizedDataset


class ModelSection(TargetPathSection):
    """Whose tokenizer, and which draft."""

    draft_model_config: Path | None = Field(None, description="config.json of the draft, for its vocabulary size")
    draft_vocab_size: int | None = Field(None, ge=1, description="default: the draft config's, else at most 32000")


class ViewSection(Section):
    """What to show."""

    view_train_data: tuple[int, ...] = Field((), description="numbers of training samples to show, from 0")
    view_html: Path | None = Field(None, description="write the shown samples to this file instead")


class CacheConfig(Section):
    """Everything this script takes."""

    model: ModelSection
    data: DataSection = DataSection()
    view: ViewSection = ViewSection()


def main() -> None:
    config = parse_config(CacheConfig, description=__doc__ or "")
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
        from specforge_lite.model.draft import DraftConfig

        train.warn_beyond(DraftConfig.from_json(config.model.draft_model_config).max_position_embeddings)
    open_or_build_vocab_map(train, draft_vocab_size, vocab_size, config.data.cache_dir)
    show(config.view, train, tokenizer)


def choose_draft_vocab_size(section: ModelSection, target_config: Any) -> int:
    """From the flag, the draft's config.json, or as many as a derived draft has."""
    vocab_size = int(target_config.get_text_config().vocab_size)
    if section.draft_vocab_size is not None:
        return section.draft_vocab_size
    if section.draft_model_config is None:
        return min(32000, vocab_size)
    from specforge_lite.training.wiring import read_draft_config

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
