"""An option of training is defined in one place, from which the command line takes it."""

import click
import pytest
from pseuzo.cli.commands import train, train_defaults
from pseuzo.cli.options import APPLIES_TO, setting_name
from pseuzo.models.modes import MODES, mode_options
from pseuzo.train.options import OPTIONS

PARAMETERS = {p.name: p for p in train.params}
# On the command line, these defaults depend on the tuning mode.
DEFAULTS = train_defaults()
BY_MODE = {"learning_rate", "eps"}


@pytest.mark.parametrize("name", [n for n, o in OPTIONS.items() if not o.flag.hidden])
def test_an_option_has_the_default_choices_and_help_of_its_field(name):
    o, p = OPTIONS[name], PARAMETERS[setting_name(OPTIONS[name])]
    assert o.help in p.help
    assert o.flag_name.split("/")[0] in p.opts
    if o.choices:
        assert isinstance(p.type, click.Choice) and tuple(p.type.choices) == tuple(o.choices)
    if name in BY_MODE:
        assert DEFAULTS[p.name] is None and all(mode in p.help for mode in MODES)
    elif o.type == list[str]:
        assert p.multiple and list(DEFAULTS[p.name]) == o.default
    else:
        assert (DEFAULTS[p.name] or None) == (o.default or None)
    if o.applies_to:
        assert APPLIES_TO[p.name] == o.applies_to


@pytest.mark.parametrize("name", [n for n, (o, _) in mode_options().items() if o.on_command_line])
def test_an_option_of_a_mode_has_the_default_and_help_of_its_row(name):
    o, modes = mode_options()[name]
    p = PARAMETERS[name]
    assert DEFAULTS[name] == o.default and o.help in p.help
    assert APPLIES_TO[name] == {"mode": modes}
