"""Make peft know the method "QWHA" and our layers under LoRA: a member of its PeftType enum, then its own registration.

`register_peft_method` refuses a name that is no member of `PeftType`, and transformers calls `peft_type.value`, so a plain string
does not do: the member has to exist. Enums offer no way to add one, so it is built by hand, as the enum machinery itself does it.
The attributes used are the same in Python 3.11, 3.12 and 3.13 (a test runs this on every interpreter that it finds).

Nothing happens at import: `register()` does the work and may be called any number of times.
"""

from __future__ import annotations

import enum

from peft import PeftType

METHOD = "qwha"
"""peft's name of the method; the enum member is its upper case, the prefix of its tensors `qwha_`."""


def add_member(enum_class: type[enum.Enum], name: str) -> enum.Enum:
    """Give a `class X(str, Enum)` one more member whose value is its name; the existing one is returned if it is there.

    The member is an ordinary one: `X(name)`, `X[name]`, `X.name`, iteration, `in`, pickle, deepcopy and JSON all find it, and it
    hashes as its string, so that the text in a file finds it in a dictionary.

    Args:
        enum_class: An enum that also inherits from str. Changed in place.
        name: Name and value of the member.

    Returns:
        The member.
    """
    members: dict[str, enum.Enum] = enum_class._member_map_  # type: ignore[attr-defined]
    if name in members:
        return members[name]
    member = str.__new__(enum_class, name)  # type: ignore[type-var]
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(members)
    member.__objclass__ = enum_class
    enum_class._member_names_.append(name)  # type: ignore[attr-defined]
    members[name] = member
    enum_class._value2member_map_[name] = member  # type: ignore[attr-defined]
    # Python 3.14 answers `in` from a list of its own
    getattr(enum_class, "_hashable_values_", []).append(name)
    # EnumType.__setattr__ forbids to assign members; the class attribute is what `X.name` reads
    type.__setattr__(enum_class, name, member)
    return member


def peft_type() -> PeftType:
    """The member `PeftType.QWHA`, added on the first call."""
    return PeftType(add_member(PeftType, METHOD.upper()))


def register() -> None:
    """Register SpectralConfig and SpectralModel as peft's method "qwha", and LowRankModel as its tuner for "lora".

    Does nothing when that was done before. LowRankModel differs from peft's own tuner on models with quantized layers only.
    """
    # the classes need peft_type() themselves, so they cannot be imported above
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils.peft_types import register_peft_method

    from qwha_cli.adapters.low_rank.model import LowRankModel
    from qwha_cli.adapters.spectral.config import SpectralConfig
    from qwha_cli.adapters.spectral.model import SpectralModel

    if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=METHOD, config_cls=SpectralConfig, model_cls=SpectralModel)
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LowRankModel
