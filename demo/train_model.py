"""Train the small language model that the demonstrations, tests and examples of rowscope start from.

The text is the Python standard library's own `.py` sources, which every machine with Python has, so that nothing has
to be downloaded. The script trains a byte-level BPE tokenizer and a Llama-shaped transformer of about 3.5 million
parameters on it, measures both against count-based baselines on files held out of the training, and saves everything
in Hugging Face format, with the measurements in `training_log.json`.

    python demo/train_model.py --output demo/model

It takes about half an hour on two processor cores. All losses are in nats per token. Another Python version has
another standard library and so gives another model; the log records the version and the text's SHA-256.
"""

import argparse
import hashlib
import json
import math
import platform
import shutil
import sysconfig
import time
from pathlib import Path

import numpy
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM

BEGIN, END, PAD = "<s>", "</s>", "<pad>"
# Tests are repetitive, encodings are tables of character codes, and installed packages differ between machines.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings"}
HELD_OUT_PERCENT = 3


def read_standard_library() -> dict[str, str]:
    """Return the text of each standard library source, keyed by its path below the library's folder, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        # `_sysconfigdata*` is written when Python is built and names folders of the machine that built it.
        if SKIPPED_FOLDERS & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            texts[relative.as_posix()] = text
    return texts


def is_held_out(name: str) -> bool:
    """Tell whether the file of this name is held out; the name alone decides, so the split never depends on order."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def hash_texts(texts: dict[str, str]) -> str:
    """Return the SHA-256 of all names and texts."""
    digest = hashlib.sha256()
    for name, text in texts.items():
        digest.update(name.encode() + b"\0" + text.encode() + b"\0")
    return digest.hexdigest()


def train_tokenizer(texts: list[str], vocabulary: int, length: int) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with `vocabulary` entries which reads every digit as a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: transformers.PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return all texts as one row of token numbers, each text between the begin and end tokens."""
    tokens: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        tokens += [tokenizer.bos_token_id, *encoding.ids, tokenizer.eos_token_id]
    return torch.tensor(tokens)


def count_baselines(train: torch.Tensor, held_out: torch.Tensor, vocabulary: int) -> dict[str, float]:
    """Return the held-out loss of two counting models: add-one unigram and interpolated (Witten-Bell) bigram."""
    seen = train.numpy()
    before, after = held_out[:-1].numpy(), held_out[1:].numpy()
    unigram = numpy.bincount(seen, minlength=vocabulary) + 1.0
    unigram /= unigram.sum()
    pairs = numpy.bincount(seen[:-1] * vocabulary + seen[1:], minlength=vocabulary**2).reshape(vocabulary, vocabulary)
    total, kinds = pairs.sum(1), (pairs > 0).sum(1)
    # A token that never came before another has total = kinds = 0; then the unigram alone predicts.
    bigram = (pairs[before, after] + kinds[before] * unigram[after]) / numpy.maximum(total + kinds, 1)[before]
    bigram = numpy.where(total[before] > 0, bigram, unigram[after])
    return {"unigram": float(-numpy.log(unigram[after]).mean()), "bigram": float(-numpy.log(bigram).mean())}


def build_model(vocabulary: int, positions: int, tokenizer: transformers.PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained transformer: 8 layers of 192, 6 query heads to 2 key-value heads, tied embeddings."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # At this size the plain attention is faster on a processor than the fused one; the weights are the same for both.
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def sequence_loss(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of predicting each token of the windows (count, length + 1) from those before it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokens: torch.Tensor, length: int) -> float:
    """Return the mean loss over `tokens`, read in windows of `length` that share only their edge token."""
    model.eval()
    windows = tokens.unfold(0, length + 1, length)
    total = sum(sequence_loss(model, batch).item() * len(batch) for batch in windows.split(32))
    model.train()
    return total / len(windows)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Return the rate of a linear warm-up to `peak` followed by a cosine descent to a hundredth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, tokens: torch.Tensor, held_out: torch.Tensor, options: argparse.Namespace) -> list:
    """Train `model` in place on random windows of `tokens` and return the loss curve, one record per measurement."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95), fused=True)
    windows = tokens.unfold(0, options.length + 1, 1)
    curve, recent, start = [], [], time.monotonic()
    for step in range(1, options.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, options.steps, options.rate)
        loss = sequence_loss(model, windows[torch.randint(len(windows), (options.batch,))])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise RuntimeError(f"the loss is not finite at step {step}")
        if step % options.every == 0 or step == options.steps:
            # The first windows are enough to follow the training; the final figure is over all of them.
            measured = held_out_loss(model, held_out[: 64 * options.length + 1], options.length)
            record = {"step": step, "train_loss": sum(recent) / len(recent), "held_out_loss_64_windows": measured}
            curve.append({name: round(value, 4) for name, value in record.items()})
            print(curve[-1], f"{time.monotonic() - start:.0f} s", flush=True)
            recent = []
            save(model, options.output.with_name(options.output.name + ".unfinished"))
    return curve


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write a bfloat16 copy of `model` and its greedy generation settings into `folder`."""
    config = model.config
    copy = LlamaForCausalLM(config)
    copy.bfloat16()
    copy.load_state_dict(model.state_dict())
    copy.generation_config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    copy.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per window")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--every", type=int, default=100, help="steps between measurements")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.set_seed(options.seed)
    start = time.monotonic()

    texts = read_standard_library()
    train_texts = [text for name, text in texts.items() if not is_held_out(name)]
    held_out_texts = [text for name, text in texts.items() if is_held_out(name)]
    unfinished = options.output.with_name(options.output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer = train_tokenizer(train_texts, options.vocabulary, options.positions)
    tokenizer.save_pretrained(unfinished)
    train_tokens, held_out = encode(tokenizer, train_texts), encode(tokenizer, held_out_texts)
    held_out = held_out[: (len(held_out) - 1) // options.length * options.length + 1]
    baselines = count_baselines(train_tokens, held_out, options.vocabulary)
    print(f"{len(train_tokens)} training tokens, {len(held_out)} held out, baselines {baselines}", flush=True)

    model = build_model(options.vocabulary, options.positions, tokenizer)
    curve = train(model, train_tokens, held_out, options)
    save(model, unfinished)
    saved = transformers.AutoModelForCausalLM.from_pretrained(unfinished, dtype=torch.float32)
    final = held_out_loss(saved, held_out, options.length)
    log = {
        "seed": options.seed,
        "python": platform.python_version(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "text": {
            "files": len(texts),
            "held_out_files": len(held_out_texts),
            "sha256": hash_texts(texts),
            "bytes": sum(len(text.encode()) for text in texts.values()),
            "train_tokens": len(train_tokens),
            "held_out_tokens": len(held_out),
        },
        "parameters": saved.num_parameters(),
        "config": model.config.to_diff_dict(),
        "training": {
            "steps": options.steps,
            "batch": options.batch,
            "length": options.length,
            "peak_learning_rate": options.rate,
            "threads": options.threads,
            "seconds": round(time.monotonic() - start),
        },
        "held_out_loss": {"model": round(final, 4), **{name: round(value, 4) for name, value in baselines.items()}},
        "curve": curve,
    }
    (unfinished / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    shutil.rmtree(options.output, ignore_errors=True)
    unfinished.rename(options.output)
    print(f"final held-out loss {final:.4f}, written to {options.output}")


if __name__ == "__main__":
    main()
