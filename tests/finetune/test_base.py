"""An adapter on other weights than its own says so."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from rowscope import InputError, RowsConfig, Selection, models
from rowscope.finetune import OtherBaseWarning, load_adapter

MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def saved(make_model, tmp_path):
    """Two checkpoints of one shape, and an adapter whose rows were selected on the first."""
    for name, seed in (("own", 0), ("other", 1)):
        make_model(seed=seed).save_pretrained(tmp_path / name)
    selection = Selection(
        {MODULE: {"row": torch.tensor([3])}},
        {MODULE: (48, 32)},
        model_fingerprint=models.fingerprint(tmp_path / "own"),
    )
    get_peft_model(make_model(), RowsConfig.from_selection(selection)).save_pretrained(tmp_path / "adapter")
    return tmp_path


def load(folder, make_model):
    return type(make_model()).from_pretrained(folder)


def test_another_base_gives_a_warning_that_can_be_an_error(saved, make_model):
    """PEFT's own loader warns on other weights; made an error, load_adapter says it in one line."""
    with pytest.warns(OtherBaseWarning, match="other weights than those of .*other"):
        PeftModel.from_pretrained(load(saved / "other", make_model), saved / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherBaseWarning)
        with pytest.raises(InputError, match="use its own base model"):
            load_adapter(load(saved / "other", make_model), saved / "adapter")


def test_the_own_base_and_an_unknown_one_are_quiet(saved, make_model):
    """No warning on the weights it was selected on, nor where a model's checkpoint is not known."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherBaseWarning)
        load_adapter(load(saved / "own", make_model), saved / "adapter")
        load_adapter(make_model(seed=1), saved / "adapter")


def test_a_fingerprint_of_a_name_asks_no_network(tmp_path):
    """Names that are neither here nor in the hub's cache, and broken checkpoints, have no fingerprint."""
    assert models.local_fingerprint("someone/absent") is None
    assert models.local_fingerprint(str(tmp_path)) is None
    assert models.local_fingerprint("demo") == models.load("demo").fingerprint
