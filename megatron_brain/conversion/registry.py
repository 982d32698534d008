"""The families: which one a Hugging Face directory belongs to, and which one a model is written as."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_brain.config.model import ModelConfig
from megatron_brain.config.stage_spec import Head
from megatron_brain.conversion.families import gemma2, gpt2, gpt_neox, llama, mistral, phi3, qwen2, qwen3
from megatron_brain.conversion.family import Family, UnsupportedFamily
from megatron_brain.errors import ConfigError

FAMILIES: tuple[Family, ...] = (
    # Two or all of these three can express the same model. Llama comes first because most programs run it. Mistral
    # comes before Phi-3 because more programs know its separate tensors than Phi-3's fused ones.
    llama.FAMILY,
    mistral.FAMILY,
    phi3.FAMILY,
    # Each of these four expresses models that no other family can, so their places do not matter.
    qwen2.FAMILY,
    qwen3.FAMILY,
    gpt2.FAMILY,
    gpt_neox.FAMILY,
)
"""Every family that is converted. A model without `hf_model_type` is written as the first one that can express it."""

UNSUPPORTED: tuple[UnsupportedFamily, ...] = (gemma2.UNSUPPORTED,)
"""Known families that are refused, with what our network lacks for them."""

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class HFModel:
    """A Hugging Face directory as its config.json describes it. `architecture` has keys of ARCHITECTURE_FIELDS."""

    directory: Path
    family: Family
    head: Head
    architecture: dict
    config: dict


def read_hf_model(directory: str | Path) -> HFModel:
    """Read config.json.

    Raises:
        ConfigError: there is no directory or no config.json, no family has this architecture, `model_type` names
            another one, or an option is not supported.
    """
    path = Path(directory)
    config = _read_config(path)
    family, head = _family_of(config.get("architectures"), path / "config.json")
    model_type = config.get("model_type")
    if model_type != family.model_type:
        raise ConfigError(
            f"{path / 'config.json'}: architectures={config['architectures']} is {family.name}, but "
            f"model_type={model_type!r}, by which transformers chooses, is not {family.model_type!r}: correct the one "
            "that is wrong"
        )
    try:
        sizes = family.architecture(config)
        if head == "reward":
            _check_classifier(config, sizes["vocab_size"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return HFModel(directory=path, family=family, head=head, architecture=sizes, config=config)


def read_hf_architecture(directory: str | Path) -> dict:
    """Sizes of the model in a Hugging Face directory, keys of ARCHITECTURE_FIELDS.

    Raises:
        ConfigError: like `read_hf_model`.
    """
    return read_hf_model(directory).architecture


def family_for_export(model: ModelConfig) -> Family:
    """The family that a model is written as: the one that `hf_model_type` names, else the first that can express it.

    Raises:
        ConfigError: the family cannot express the model, or no family can.
    """
    able = [family for family in FAMILIES if not family.lacks(model)]
    wanted = model.hf_model_type
    if wanted is None:
        if not able:
            reasons = "; ".join(f"{family.name}: {', '.join(family.lacks(model))}" for family in FAMILIES)
            raise ConfigError(f"no family of Hugging Face models has all that this model has ({reasons})")
        return able[0]
    named = [family for family in FAMILIES if family.model_type == wanted]
    if not named:
        known = ", ".join(sorted(family.model_type for family in FAMILIES))
        raise ConfigError(f"hf_model_type={wanted} is not supported; supported are {known}")
    [family] = named
    if family not in able:
        others = ", ".join(other.model_type for other in able)
        cure = f"set --hf-model-type to one that can: {others}" if able else "no other family can"
        raise ConfigError(f"transformers' {family.name} cannot have {'; '.join(family.lacks(model))}: {cure}")
    return family


def _family_of(named: object, where: Path) -> tuple[Family, Head]:
    supported: dict[str, tuple[Family, Head]] = {
        **{family.policy_class: (family, "policy") for family in FAMILIES},
        **{family.reward_class: (family, "reward") for family in FAMILIES},
    }
    unsupported = {name: family for family in UNSUPPORTED for name in family.classes}
    for name in named if isinstance(named, list) else []:
        if not isinstance(name, str):
            continue
        if name in supported:
            return supported[name]
        if name in unsupported:
            missing = ", no ".join(unsupported[name].missing)
            raise ConfigError(
                f"{where}: {unsupported[name].name} ({name}) is not supported: our network has no {missing}"
            )
    raise ConfigError(f"{where}: architectures={named} is not supported; supported are {', '.join(sorted(supported))}")


def _refuse_adapter(directory: Path) -> None:
    """Refuse an adapter: transformers would apply it to the weights beside it, or to those of another folder."""
    if (directory / _ADAPTER).is_file():
        raise ConfigError(
            f"{directory} has an {_ADAPTER}: the model is its weights with that adapter. Merge them with peft "
            "(AutoPeftModelForCausalLM.from_pretrained, then merge_and_unload and save_pretrained) and give that "
            f"folder, or remove {_ADAPTER} to take the weights without the adapter"
        )


def _read_config(directory: Path) -> dict:
    path = directory / "config.json"
    if not directory.is_dir():
        raise ConfigError(
            f"{directory} is not a directory: give the local directory of a Hugging Face model "
            "(`hf download NAME --local-dir DIR` fetches one from the hub)"
        )
    _refuse_adapter(directory)
    if not path.is_file():
        raise ConfigError(
            f"{directory} has no config.json: it is not the directory of a Hugging Face model; give one, or fetch the "
            "file too"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}): fetch it again") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}, not a JSON object: fetch it again")
    return config


def _check_classifier(config: dict, vocab_size: int) -> None:
    """Refuse a classifier with several labels, or one that transformers does not read at the end-of-text token."""
    named = config.get("id2label")
    labels = len(named) if named and isinstance(named, dict) else config.get("num_labels", 2)
    if labels != 1:
        raise ConfigError(f"the classifier has {labels!r} labels; a reward model has one (num_labels=1)")
    pad, ends = config.get("pad_token_id"), config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if pad is not None and (type(pad) is not int or not 0 <= pad < vocab_size):
        raise ConfigError(
            f"pad_token_id={pad!r} is not one of the {vocab_size} token ids: transformers finds the end of a text by "
            "it. Give the id of a token that is in no text, or null"
        )
    refuse_pad_that_ends(pad, ends)


def refuse_pad_that_ends(pad: int | None, ends: Collection[int | None]) -> None:
    """Raise ConfigError where a classifier's `pad_token_id` is one of the ids that end a text."""
    if pad is not None and pad in ends:
        raise ConfigError(
            f"pad_token_id is {pad}, which ends a text: transformers then reads the reward at the token before it, we "
            "at the end of text. If the model was trained to be read there, give pad_token_id in config.json another id"
        )
