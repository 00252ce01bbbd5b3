"""Datasets are read from every source, split without overlap, and tokenised as the trainer does it."""

import json

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from rowscope import InputError, data
from rowscope.settings import CalibrationSettings


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_demo_splits_do_not_overlap():
    """Guards the embedded data: no example of one split stands in another, and all of it is small."""
    for source, column in (("demo", "prompt"), ("demo-text", "text")):
        splits = data.load(source)
        rows = {name: set(splits[name][column]) for name in data.SPLITS}
        assert all(rows.values())
        assert not rows["train"] & rows["validation"]
        assert not rows["train"] & rows["test"]
        assert not rows["validation"] & rows["test"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".txt"])
def test_files_of_every_kind(tmp_path, suffix):
    """Guards the readers: the same examples from each kind of file."""
    from datasets import Dataset

    rows = Dataset.from_dict({"text": ["first line", "second line"]})
    path = tmp_path / f"x{suffix}"
    if suffix in (".jsonl", ".json"):
        rows.to_json(path)
    elif suffix == ".csv":
        rows.to_csv(path, index=False)
    elif suffix == ".parquet":
        rows.to_parquet(path)
    else:
        path.write_text("first line\nsecond line\n")
    assert data.load(str(path))["train"]["text"][:] == ["first line", "second line"]


def test_a_folder_holds_a_file_a_split(tmp_path):
    """Guards folders: files are splits by name, other files are left alone."""
    for name in ("train", "test", "other"):
        write(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": "x", "extra": 1}])
    splits = data.load(str(tmp_path))
    assert sorted(splits.splits) == ["test", "train"]
    assert splits.held_out() is None
    assert splits["train"].column_names == ["prompt", "completion"]
    with pytest.raises(InputError, match="has no split 'validation': it has train, test; add one"):
        splits["validation"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2 is not a JSON object"),
        ('{"text": "a"}\n[1]\n', "line 2 is not a JSON object"),
        ("", "is empty"),
        ("\n\n", "cannot be read|is empty|has no columns"),
        ('{"question": "a"}\n', "has question: rowscope reads"),
        ('{"text": 3}\n', "'text' holds int64"),
        ('{"text": "a"}\n{"text": null}\n', "missing values"),
    ],
)
def test_bad_files(tmp_path, lines, message):
    """Guards the one-line answers to files that are no dataset."""
    (tmp_path / "x.jsonl").write_text(lines)
    with pytest.raises(InputError, match=message):
        data.load(str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "some-org/some-data", "x.docx"])
def test_unknown_data(tmp_path, source, monkeypatch):
    """Guards the answers to a name that is nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.docx").write_text("x")
    with pytest.raises(InputError):
        data.load(source)


def test_tokens_are_the_trainers(demo, tmp_path):
    """Guards scores against training: ids and trained positions equal those of TRL's SFTTrainer, padding included."""
    import copy

    rows = data.load("demo")["train"].select(range(5))
    trainer = SFTTrainer(
        model=copy.deepcopy(demo.model),
        args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", loss_type="nll"),
        train_dataset=rows,
        processing_class=demo.tokenizer,
    )
    theirs = trainer.data_collator([trainer.train_dataset[number] for number in range(5)])
    ours = data.collate([data.tokenise(row, demo.tokenizer, 512) for row in rows], demo.tokenizer.pad_token_id)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    assert torch.equal(ours["labels"], theirs["labels"])


def test_calibration_batches_are_seeded(demo):
    """Guards comparisons of criteria: one seed, one set of batches; padding has mask 0 and label -100."""
    rows = data.load("demo")["train"]
    first, again, other = (
        data.calibration_batches(rows, demo.tokenizer, CalibrationSettings(2, 3), seed) for seed in (0, 0, 1)
    )
    assert data.fingerprint(first) == data.fingerprint(again) != data.fingerprint(other)
    assert len(first) == 2
    for batch in first:
        padding = batch["attention_mask"] == 0
        assert (batch["labels"][padding] == -100).all()
        assert (batch["input_ids"][padding] == demo.tokenizer.pad_token_id).all()


def test_batches_without_a_label_are_refused(demo):
    """Guards against a NaN loss: prompts longer than the cut leave nothing to learn from."""
    rows = data.load("demo")["train"]
    with pytest.raises(InputError, match="raise --score-tokens"):
        data.calibration_batches(rows, demo.tokenizer, CalibrationSettings(1, 2, 3))
