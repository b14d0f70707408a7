"""The general rules for the fields of a configuration."""

import random

import pytest

from configs.checks import RANGES, check_config, flat
from configs.default import get_config


def with_value(field, value):
    config = get_config().unlock()
    section, _, name = field.rpartition(".")
    with (config[section] if section else config).ignore_type():
        (config[section] if section else config)[name] = value
    return config


def numbers(default):
    entries = (default or (1,)) if isinstance(default, tuple) else (default,)
    return all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in entries)


DEFAULTS = flat(get_config())


def test_every_number_has_a_range_that_its_default_is_in():
    assert {field for field, default in DEFAULTS.items() if numbers(default)} == set(RANGES)
    check_config(get_config())


@pytest.mark.parametrize("field", RANGES)
def test_numbers_that_are_not_finite_or_out_of_range_are_refused(field):
    default = DEFAULTS[field]
    low, high = (float(bound) for bound in RANGES[field][1:-1].split(","))
    bad = [float("nan"), float("inf"), -float("inf"), "a", None]
    bad += [low - 1] * (low > -1e300) + [high + 1] * (high < 1e300) + [low] * (RANGES[field][0] == "(" and low > -1e300)
    kind = type(((*default, 1)[0]) if isinstance(default, tuple) else default)
    for value in bad:
        value = kind(value) if isinstance(value, float) and abs(value) < 1e300 else value
        with pytest.raises(ValueError, match=rf"^{field} is .*; (it|each entry) must "):
            check_config(with_value(field, (value,) if isinstance(default, tuple) else value))


def test_a_number_without_a_range_is_named(monkeypatch):
    monkeypatch.delitem(RANGES, "eval.rtol")
    with pytest.raises(ValueError, match=r"^eval.rtol is a number without a range: add .* configs/checks.py:RANGES$"):
        check_config(get_config())


def test_fields_that_do_not_exist_or_are_missing_are_refused():
    """A user's own file can have such fields, because they are not checked while it is read."""
    config = get_config()
    config.training.batchsize = 3
    with pytest.raises(ValueError, match=r"no field training\.batchsize; did you mean training\.batch_size"):
        check_config(config)
    config = get_config()
    del config.eval.rtol
    with pytest.raises(ValueError, match=r"lacks the field eval\.rtol; begin with configs\.default\.get_config"):
        check_config(config)


def test_values_of_another_type_are_refused():
    """Any field, any other type; also a tuple of the wrong type within, or none at all."""
    values = random.Random(0)
    for field, default in DEFAULTS.items():
        kind = type(default)
        others = [v for v in (True, 3, 0.5, "x", None, (1, 2), {"a": 1}) if type(v) is not kind]
        others = [v for v in others if not (kind is float and isinstance(v, int))]  # which become floats
        with pytest.raises(ValueError, match=f"^{field} is "):
            check_config(with_value(field, values.choice(others)))
    for value in ((1, "a"), (1.5,), ("1",), (1, None), None, 2, ((1, 2),)):
        with pytest.raises(ValueError, match=r"^model.ch_mult is "):
            check_config(with_value("model.ch_mult", value))
