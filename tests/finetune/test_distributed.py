"""Two processes that train together learn what one learns with their batches put together, as DDP and as FSDP2.

Run as a program, this file is one of the two.
"""

import dataclasses
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from rowscope import InputError, RowsConfig, ranks
from rowscope.analysis.memory import MemoryCallback
from rowscope.finetune import TrainingSettings, load_adapter, recompute_activations, train
from rowscope.finetune.layer import RowsLayer
from rowscope.runs import RunFolder

TIMEOUT = 240  # seconds; a hang is a failure
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS = ["<pad>", "<eos>", "<unk>", "plus", "is", *NUMBERS]
EXAMPLES = [  # of unequal lengths; every answer has one word, so that a held-out loss does not depend on the batches
    {"prompt": " plus ".join([NUMBERS[a]] + [NUMBERS[b]] * (1 + a % 2)), "completion": f" is {NUMBERS[a + b]}"}
    for a in range(6)
    for b in range(5)
] + [{"prompt": "zero plus six", "completion": " is six"}, {"prompt": "one plus six", "completion": " is seven"}]
BATCH = 4  # of all processes
SETTINGS = TrainingSettings(learning_rate=2e-3, max_steps=4, warmup_steps=0, save_steps=2, eval_steps=2)
CASES = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "checkpointed": {"activation_checkpointing": True},
    "checkpointed, accumulated": {"activation_checkpointing": True, "gradient_accumulation_steps": 2},
    "kept": {"recompute": False},
}
SHARDED = ("plain", "accumulated", "kept")


def tiny_model(attention_dropout=0.0):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(WORDS), max_position_embeddings=64, attention_dropout=attention_dropout, initializer_range=0.2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def word_tokenizer():
    model = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token=None
    )


def rows(**fields):
    """Rows of some modules, columns of others, started at random so that a delta counted twice is seen."""
    return RowsConfig(
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], num_rows=5,
        axis_pattern={"down_proj": "column"}, init_weights=False, **fields,
    )  # fmt: skip


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step, whole, and whether rows are held in the weights."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.held = [layer.can_hold(["default"]) for layer in model.modules() if isinstance(layer, RowsLayer)]
        if not self.found:
            gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
            self.found = {
                name: (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
                for name, grad in gradients.items()
            }


class Interrupt(TrainerCallback):
    """Presses Ctrl-C at the beginning of a step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def trained(folder, *, resume=False, callbacks=(), attention_dropout=0.0, **settings):
    """Train in `folder`, all processes together with one batch; what `train` returns, without the time it took."""
    settings = dataclasses.replace(SETTINGS, per_device_train_batch_size=BATCH // ranks.world()[1], **settings)
    dataset = Dataset.from_list(EXAMPLES)
    result = train(
        tiny_model(attention_dropout), word_tokenizer(), dataset, dataset.select(range(0, 32, 4)), rows(), settings,
        RunFolder(folder), resume=resume, callbacks=callbacks,
    )  # fmt: skip
    return dataclasses.asdict(dataclasses.replace(result, seconds=0.0))


def trained_with_gradients(folder, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    gradients = Gradients()
    result = trained(folder, callbacks=[gradients, MemoryCallback(folder / "memory.json")], **settings)
    return result, gradients


# ---------------------------------------------------------------------------------------------- one of two processes


def train_case(folder, rank, case, **more):
    result, gradients = trained_with_gradients(folder / case, **CASES[case], **more)
    (folder / f"{case}-{rank}.json").write_text(json.dumps({"result": result, "held": gradients.held}))
    torch.save(gradients.found, folder / f"{case}-{rank}.pt")


def resumed(folder, rank):
    """A straight run, and one that is interrupted and resumed; dropout makes every random number count."""
    (folder / "straight").mkdir(parents=True, exist_ok=True)
    (folder / "broken").mkdir(exist_ok=True)
    trained(folder / "straight", attention_dropout=0.1)
    with pytest.raises(KeyboardInterrupt):
        trained(folder / "broken", attention_dropout=0.1, callbacks=[Interrupt()])
    ranks.gathered(None)  # neither resumes before the other has stopped
    result = trained(folder / "broken", attention_dropout=0.1, resume=True)
    (folder / f"resumed-{rank}.json").write_text(json.dumps(result))


def failures(folder, rank):
    """What each process says of mishaps that both meet, or one alone."""

    def said(name, full_disk_of=None, limit=0, **settings):
        run = folder / name
        run.mkdir(exist_ok=True)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if full_disk_of == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            trained(run, **settings)
        except (InputError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return "nothing"

    return {
        "adapter": said("adapter", full_disk_of=0, limit=4000),
        "random state": said("random state", full_disk_of=1, limit=4000),
        "log": said("log", full_disk_of=0, limit=100, eval_steps=1),
        "diverged": said("diverged", learning_rate=3e38),
    }


def shard_on_the_cpu():
    """Have accelerate shard: it does so on accelerators alone, and would leave a CPU to DDP, whatever it is told."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"
    }  # fmt: skip
    initialize = AcceleratorState.__init__

    def initialize_sharded(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, kwargs["fsdp_plugin"]
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialize_sharded


IDS = torch.arange(2, 16).reshape(2, 7)


def adapted_model():
    return get_peft_model(tiny_model(), rows()).train()


def sharded_while_held(mend):
    """What a model says that is sharded after it has been used; `mend` is called between."""
    model = adapted_model()
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.zero_grad()
    layers = [layer for layer in model.modules() if isinstance(layer, RowsLayer)]
    assert all(layer._replaced for layer in layers)
    mend(model, layers)
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    try:
        for _ in range(2):  # what is gathered anew must be the same again
            output = model(input_ids=IDS, labels=IDS)
            output.loss.backward()
    except InputError as error:
        return str(error)
    assert not any(layer.can_hold(["default"]) for layer in layers)
    return output.logits.detach()


def sharding(folder, rank):
    found = {
        "as it is": sharded_while_held(lambda model, layers: None),
        "restored": sharded_while_held(lambda model, layers: [layer.restore() for layer in layers]),
        "saved": sharded_while_held(lambda model, layers: model.state_dict()),
        "recomputed": sharded_while_held(lambda model, layers: [model.state_dict(), recompute_activations(model)]),
    }
    torch.save(found, folder / f"sharding-{rank}.pt")


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with ranks.launched("cpu"):
        rank = ranks.world()[0]
        ddp, fsdp = folder / "ddp", folder / "fsdp"
        for case in CASES:
            train_case(ddp, rank, case)
        resumed(ddp, rank)
        (ddp / f"failures-{rank}.json").write_text(json.dumps(failures(ddp, rank)))
        sharding(folder, rank)
        shard_on_the_cpu()
        for case in SHARDED:
            train_case(fsdp, rank, case)
        resumed(fsdp, rank)


# ---------------------------------------------------------------------------------------------- the tests


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """The folder into which two processes have written all that they found."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("ddp", "fsdp"):
        (folder / name).mkdir()
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    processes = [
        subprocess.Popen(command, env=common | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Gives what one process finds in a case: its folder, result and gradients; each is trained once."""
    found = {}

    def train_alone(case):
        if case not in found:
            folder = tmp_path_factory.mktemp("alone")
            found[case] = folder, *trained_with_gradients(folder, **CASES[case])
        return found[case]

    return train_alone


def same_values(found, expected):
    """Whether two dictionaries are equal, their floats to 1e-6."""
    return found.keys() == expected.keys() and all(
        found[name] == (pytest.approx(value, abs=1e-6, rel=1e-6) if isinstance(value, float) else value)
        for name, value in expected.items()
    )


def assert_as_alone(folder, case, alone):
    own_folder, result, gradients = alone(case)
    told = [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0]["result"] == told[1]["result"]
    assert same_values(told[0]["result"], result)
    for rank in (0, 1):
        found = torch.load(folder / f"{case}-{rank}.pt")
        assert {name.replace("_checkpoint_wrapped_module.", "") for name in found} == set(gradients.found)
        for name, gradient in gradients.found.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-6)
    logs = [RunFolder(path).read_log() for path in (folder / case, own_folder)]
    assert len(logs[0]) == len(logs[1])
    assert all(same_values(*lines) for lines in zip(*logs, strict=True)), logs
    adapters = [load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder / case, own_folder)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[1].items():
        torch.testing.assert_close(adapters[0][name], tensor, atol=1e-6, rtol=0)
    return told


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(two_ranks, alone, case):
    """Guards DDP: gradients, losses, log and adapter are those of one process with the whole batch, every line is
    written once, both processes have the result, and rows are held in the weights as in one process."""
    told = assert_as_alone(two_ranks / "ddp", case, alone)
    assert all(all(of_one["held"]) for of_one in told)
    memory = [json.loads((path / "memory.json").read_text()) for path in (two_ranks / "ddp" / case, alone(case)[0])]
    for component in ("base_weights", "adapter", "gradients", "optimizer"):
        assert memory[0]["components"][component] == memory[1]["components"][component]


@pytest.mark.parametrize("case", SHARDED)
def test_sharded_is_the_same(two_ranks, alone, case):
    """Guards FSDP2 through the Trainer: a weight that is sharded is not written to, and gradients, losses, log and
    adapter are those of one process; what is saved is whole, and loads in one process."""
    told = assert_as_alone(two_ranks / "fsdp", case, alone)
    assert not any(any(of_one["held"]) for of_one in told)
    logits = [
        load_adapter(tiny_model(), path / "adapter")(input_ids=IDS).logits
        for path in (two_ranks / "fsdp" / case, alone(case)[0])
    ]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)
    memory = [json.loads((path / "memory.json").read_text()) for path in (two_ranks / "fsdp" / case, alone(case)[0])]
    weights = [found["components"]["base_weights"] for found in memory]
    assert weights[0] < 0.6 * weights[1]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_resumed_run_is_the_straight_run(two_ranks, kind):
    """Guards resume of several processes: same adapter and log, bit for bit, each with its own random numbers."""
    folder = two_ranks / kind
    results = [json.loads((folder / f"resumed-{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]
    assert results[0]["resumed_from"] == 2
    straight, broken = RunFolder(folder / "straight"), RunFolder(folder / "broken")
    assert broken.read_log() == straight.read_log()
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (broken.adapter / file).read_bytes() == (straight.adapter / file).read_bytes()


def test_another_number_of_processes_does_not_resume(two_ranks):
    """Guards resume: one process cannot go on where two were, and removes nothing of what they have written."""
    run = two_ranks / "ddp" / "straight"
    before = sorted(path.name for path in run.rglob("*"))
    with pytest.raises(InputError, match=r"checkpoint-4 holds the random numbers of 2 processes, not of 1"):
        trained(run, attention_dropout=0.1, resume=True)
    assert sorted(path.name for path in run.rglob("*")) == before


def test_one_process_s_failure_ends_both(two_ranks):
    """Guards against a process that waits for ever: a disk that is full for one of them ends both, and one says it."""
    first, second = (json.loads((two_ranks / "ddp" / f"failures-{rank}.json").read_text()) for rank in (0, 1))
    assert first["adapter"].startswith("InputError: cannot write a checkpoint")
    assert second["adapter"].startswith("ElsewhereError: cannot write a checkpoint")
    assert first["random state"].startswith("ElsewhereError: cannot write a checkpoint")
    assert second["random state"].startswith("InputError: cannot write a checkpoint")
    assert first["log"].startswith("OSError")
    assert second["log"].startswith("ElsewhereError: rank 0 has failed (OSError")
    assert first["diverged"].startswith("InputError: training diverged")
    assert second["diverged"].startswith("ElsewhereError: training diverged")


def test_a_weight_that_holds_rows_is_not_sharded(two_ranks):
    """Guards FSDP2 against a delta that counts twice: sharding a model whose weights hold trained rows is refused at
    its next use; put back by hand, or by whoever asks for the state dict, it is the same model."""
    expected = adapted_model()(input_ids=IDS).logits
    for rank in (0, 1):
        found = torch.load(two_ranks / f"sharding-{rank}.pt")
        assert "a weight was sharded or replaced while trained rows were written in it" in found["as it is"]
        for mend in ("restored", "saved", "recomputed"):
            torch.testing.assert_close(found[mend], expected)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
