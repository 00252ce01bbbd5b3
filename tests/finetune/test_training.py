"""Training in a run folder: what is learned, what is written, and that a resumed run is the same run."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import TrainerCallback

from rowscope import InputError, RowsConfig, Selection
from rowscope.finetune import TrainingSettings, newest_valid_checkpoint, train
from rowscope.runs import RunFolder

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SUMS = [(a, b) for a in range(6) for b in range(5)]
SETTINGS = TrainingSettings(
    learning_rate=2e-2, max_steps=6, per_device_train_batch_size=4, warmup_steps=0, save_steps=2, eval_steps=2
)


@pytest.fixture
def sums():
    """Additions as prompts and completions; the prompts differ in length."""
    examples = [
        {"prompt": " plus ".join([NUMBERS[a]] + [NUMBERS[b]] * (1 + a % 2)), "completion": f" is {NUMBERS[a + b]}"}
        for a, b in SUMS
    ]
    return Dataset.from_list(examples)


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run")


def rows():
    return RowsConfig(target_modules=["up_proj", "down_proj", "o_proj"], num_rows=16, base_model_name_or_path="tiny")


def completion_loss(model, tokenizer, dataset):
    """Mean loss per completion token, one example at a time, without padding."""
    losses = []
    for example in dataset:
        prompt = tokenizer(example["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(example["prompt"] + example["completion"])["input_ids"] + [1]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        losses.append(functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="none"))
    return torch.cat(losses).mean().item()


def test_training_learns_and_writes_what_it_says(make_model, tokenizer, sums, run):
    """The loss falls, the held-out losses are those of the base and of the saved adapter, the base stays as it was."""
    before = make_model().state_dict()
    held_out = sums.select(range(0, 30, 3))
    settings = TrainingSettings(learning_rate=2e-2, max_steps=20, per_device_train_batch_size=10, warmup_steps=0)
    model = make_model()
    result = train(model, tokenizer, sums, held_out, rows(), settings, run)

    assert result.validation_loss < 0.7 * result.validation_loss_before
    assert result.steps == 20
    assert result.resumed_from is None
    assert result.validation_loss_before == pytest.approx(completion_loss(make_model(), tokenizer, held_out), abs=1e-5)
    loaded = PeftModel.from_pretrained(make_model(), run.adapter)
    assert result.validation_loss == pytest.approx(completion_loss(loaded, tokenizer, held_out), abs=1e-5)

    after = {name.replace("base_layer.", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    saved = load_file(run.adapter / "adapter_model.safetensors")
    trained = sum(tensor.numel() for name, tensor in saved.items() if name.endswith("rows_delta"))
    assert result.trainable_parameters == trained
    assert result.total_parameters == trained + sum(p.numel() for p in make_model().parameters())

    log = run.read_log()
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert {"step", "loss", "learning_rate", "grad_norm", "active_layers"} == steps[0].keys()
    assert result.train_loss == pytest.approx(sum(line["loss"] for line in steps) / 20)
    validation = {line["step"]: line["validation_loss"] for line in log if "validation_loss" in line}
    assert list(validation) == [0, *range(2, 21, 2)]
    assert validation[result.best_step] == result.validation_loss == min(validation.values())


def test_the_adapter_folder_holds_no_machine_path(make_model, tokenizer, sums, run):
    """The adapter is two files, names the base model as the caller does and is written the same each time."""
    train(make_model(), tokenizer, sums, None, rows(), SETTINGS, run)
    assert sorted(path.name for path in run.adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    text = (run.adapter / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["task_type"] == "CAUSAL_LM"
    assert str(run.root) not in text
    assert not [path for path in run.root.iterdir() if path.name.startswith(".")]


class Interrupt(TrainerCallback):
    """Presses Ctrl-C at the beginning of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def tear(checkpoint, name, keep):
    """Cut a file of a checkpoint to a part of its length; None removes it, bytes take its place."""
    file = checkpoint / name
    if keep is None:
        file.unlink()
    elif isinstance(keep, bytes):
        file.write_bytes(keep)
    else:
        file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])


@pytest.mark.parametrize(
    ("torn", "keep", "resumed_from"),
    [
        (None, None, 4),
        ("optimizer.pt", 0.6, 2),
        ("adapter_model.safetensors", 0.9, 2),
        ("trainer_state.json", 0.5, 2),
        ("trainer_state.json", None, 2),
        ("trainer_state.json", b"{}", 2),
        ("rng_state.pth", None, 2),
    ],
)
def test_a_resumed_run_is_the_straight_run(make_model, tokenizer, sums, tmp_path, torn, keep, resumed_from):
    """Interrupted and resumed, from an older checkpoint if the newest is torn: same adapter and log, bit for bit."""
    config = RowsConfig(target_modules="all-linear", num_rows=8, init_weights=False)
    settings = TrainingSettings(
        learning_rate=1e-2, max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=2,
        eval_steps=3, warmup_steps=1,
    )  # fmt: skip
    held_out = sums.select(range(5))
    straight, broken = (RunFolder.create(tmp_path / name) for name in ("straight", "broken"))
    expected = train(make_model(attention_dropout=0.1), tokenizer, sums, held_out, config, settings, straight)
    with pytest.raises(KeyboardInterrupt):
        train(
            make_model(attention_dropout=0.1), tokenizer, sums, held_out, config, settings, broken,
            callbacks=[Interrupt(5)],
        )  # fmt: skip
    if torn:
        tear(broken.checkpoints / "checkpoint-4", torn, keep)
        # Found best at step 3, this one was saved too.
        tear(broken.checkpoints / "checkpoint-3", "scheduler.pt", 0.5)
    result = train(make_model(attention_dropout=0.1), tokenizer, sums, held_out, config, settings, broken, resume=True)
    assert result.resumed_from == resumed_from
    assert result.train_loss == expected.train_loss
    assert (result.best_step, result.validation_loss) == (expected.best_step, expected.validation_loss)
    assert broken.read_log() == straight.read_log()
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (broken.adapter / file).read_bytes() == (straight.adapter / file).read_bytes()


def test_resume_without_a_checkpoint_and_after_the_end(make_model, tokenizer, sums, run):
    """Nothing to resume: the run starts afresh, dropping an old log. Finished: the result again, without training."""
    run.append_log({"step": 1, "loss": 9.0})
    assert newest_valid_checkpoint(run.checkpoints) is None
    first = train(make_model(), tokenizer, sums, None, rows(), SETTINGS, run, resume=True)
    assert first.resumed_from is None
    log = run.read_log()
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    adapter = (run.adapter / "adapter_model.safetensors").read_bytes()
    again = train(make_model(), tokenizer, sums, None, rows(), SETTINGS, run, resume=True)
    assert (again.resumed_from, again.steps, again.train_loss) == (6, 6, first.train_loss)
    assert run.read_log() == log
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == adapter


def test_the_best_adapter_is_kept(make_model, tokenizer, run):
    """Where training soon hurts the held-out loss, the adapter of lowest loss is saved, not the last."""
    example = {"prompt": "one plus one", "completion": " is two"}
    train_dataset = Dataset.from_list([example] * 8)
    # The best answer to both is half and half; training goes on to be sure of the first.
    held_out = Dataset.from_list([example, {**example, "completion": " is three"}])
    settings = TrainingSettings(
        learning_rate=2e-2, max_steps=16, warmup_steps=0, eval_steps=1, save_steps=16, save_total_limit=1
    )
    result = train(make_model(), tokenizer, train_dataset, held_out, rows(), settings, run)
    validation = {line["step"]: line["validation_loss"] for line in run.read_log() if "validation_loss" in line}
    assert result.best_step == min(range(1, 17), key=validation.__getitem__) < 16
    assert result.validation_loss == validation[result.best_step]
    saved = run.checkpoints / f"checkpoint-{result.best_step}" / "adapter_model.safetensors"
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == saved.read_bytes()


def test_a_diverged_run_stops_before_anything_is_saved(make_model, tokenizer, sums, run):
    """NaN or infinite loss is an input error that names the step; no checkpoint of it and no adapter is written."""
    settings = TrainingSettings(learning_rate=3e38, max_steps=4, warmup_steps=0, save_steps=2, logging_steps=4)
    with pytest.raises(InputError, match=r"at step 2 .*lower the learning rate"):
        train(make_model(), tokenizer, sums, None, rows(), settings, run)
    assert not run.adapter.exists()
    assert newest_valid_checkpoint(run.checkpoints) is None
    assert all(math.isfinite(line["loss"]) for line in run.read_log())


class FirstBatch(TrainerCallback):
    """Keeps the first batch the model would see."""

    def on_train_begin(self, args, state, control, train_dataloader, **kwargs):
        self.batch = next(iter(train_dataloader))


@pytest.mark.parametrize("columns", ["prompt and completion", "text"])
def test_loss_is_taken_on_completions_and_never_on_padding(make_model, tokenizer, sums, run, columns):
    """Padding has label -100 and attention 0; prompts have label -100; text counts whole; the end is learned."""
    if columns == "text":
        sums = sums.map(lambda example: {"text": example["prompt"] + example["completion"]})
        sums = sums.remove_columns(["prompt", "completion"])
    first = FirstBatch()
    train(make_model(), tokenizer, sums, None, rows(), TrainingSettings(max_steps=1), run, callbacks=[first])
    ids, labels, attention = (first.batch[name] for name in ("input_ids", "labels", "attention_mask"))
    padding = ids == tokenizer.pad_token_id
    assert padding.any()
    assert torch.equal(attention == 0, padding)
    assert (labels[padding] == -100).all()
    for row_ids, row_labels in zip(ids.tolist(), labels.tolist(), strict=True):
        end = row_ids.index(tokenizer.eos_token_id) + 1
        begin = 0 if columns == "text" else row_ids.index(tokenizer.convert_tokens_to_ids("is"))
        assert row_labels[:begin] == [-100] * begin
        assert row_labels[begin:end] == row_ids[begin:end]


def test_training_is_quiet(make_model, tokenizer, sums, run, capfd, recwarn):
    """Neither tables, nor bars where no one watches, nor the libraries' warnings reach the user."""
    train(make_model(), tokenizer, sums, sums.select(range(4)), rows(), SETTINGS, run)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""
    assert [str(warning.message) for warning in recwarn] == []


def test_any_peft_method_trains(make_model, tokenizer, sums, run):
    """The loop is not tied to rows: LoRA is the control every comparison needs."""
    config = LoraConfig(target_modules=["up_proj"], r=4)
    result = train(make_model(), tokenizer, sums, None, config, SETTINGS, run)
    assert result.trainable_parameters == 2 * 4 * (32 + 48)
    assert result.best_step == 6
    assert result.validation_loss is None
    PeftModel.from_pretrained(make_model(), run.adapter)


def test_activation_checkpointing_gives_the_same_adapter(make_model, tokenizer, sums, tmp_path):
    """Recomputing activations saves memory and changes no bit of the result on the CPU."""
    adapters = []
    for name, recompute in (("kept", False), ("recomputed", True)):
        run = RunFolder.create(tmp_path / name)
        settings = TrainingSettings(
            learning_rate=1e-2, max_steps=3, warmup_steps=0, activation_checkpointing=recompute
        )
        train(make_model(), tokenizer, sums, None, rows(), settings, run)
        adapters.append(load_file(run.adapter / "adapter_model.safetensors"))
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


def test_what_cannot_be_trained_is_refused(make_model, tokenizer, sums, run):
    """Wrong columns, no data, cut completions, a trained head and a missing GPU are input errors with a mend."""

    def refused(message, dataset=sums, config=None, settings=SETTINGS):
        with pytest.raises(InputError, match=message):
            train(make_model(), tokenizer, dataset, None, config or rows(), settings, run)

    refused("prompt and completion, or text", sums.rename_column("completion", "answer"))
    refused("training data is empty", sums.select([]))
    refused("raise max_length", settings=TrainingSettings(max_steps=1, max_length=2))
    head = Selection({"lm_head": {"row": torch.tensor([1])}}, {"lm_head": (14, 32)})
    refused("lm_head", config=RowsConfig.from_selection(head))
    if not torch.cuda.is_available():
        refused("no usable GPU", settings=TrainingSettings(device="cuda"))
    tokenizer.eos_token = None
    refused("end-of-sequence")
