#!/usr/bin/env python3
"""Train the small Llama that quantc carries for its demo and its tests.

    python3 train.py --text stories.txt wiki.txt problems.jsonl --out DIR [--steps N | --minutes M]

Needs torch, transformers, tokenizers and safetensors; one CPU thread is enough. Writes DIR/model (a Hugging Face
checkpoint in bf16 with its own byte-level BPE), DIR/calibration.txt (cut from the training documents),
DIR/evaluation.txt (documents set aside before the tokenizer saw anything) and DIR/training.json (what was run).

--steps fixes the run; --minutes times the first steps and derives the number of steps from it, which training.json
records, so that the same run can be had again by number.
"""

import argparse
import hashlib
import json
import math
import random
import re
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

EOS = "<|endoftext|>"
SEPARATOR = "<|document|>"
HELD_OUT_EVERY = 12  # of each source, one document in so many is never trained on


def documents(path: Path, limit: int) -> list[str]:
    """The documents of a file, from its start until `limit` characters of text.

    Known layouts: JSON lines with question/answer or text, `<doc ...>` ... `</doc>` articles, documents divided by
    `<|endoftext|>`; anything else is divided at blank lines.
    """
    raw = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in raw.splitlines() if line.strip()]
        # GSM8K's <<3*4=12>> are for a calculator, not for a reader.
        found = [
            row["text"] if "text" in row else row["question"] + "\n" + re.sub(r"<<.*?>>", "", row["answer"])
            for row in rows
        ]
    elif "</doc>" in raw:
        found = [re.sub(r"<doc [^>]*>", "", part) for part in raw.split("</doc>")]
        found = [part for part in found if len(part.strip()) >= 400]  # shorter ones are a title and a stub
    elif EOS in raw:
        found = raw.split(EOS)
    else:
        found = raw.split("\n\n")
    kept, size = [], 0
    for part in found:
        part = re.sub(r"\n{3,}", "\n\n", part).strip()
        if part:
            kept.append(part)
            size += len(part)
        if size >= limit:
            break
    return kept


def cut(groups: list[list[str]], shares: list[float], size: int) -> list[str]:
    """Documents of every source in turn, evenly spaced through it, to about `size` bytes in all."""
    chosen = []
    for group, share in zip(groups, shares):
        want, have = size * share, 0
        total = sum(len(d.encode()) for d in group)
        stride = max(1, int(total / max(want, 1)))
        for document in group[::stride]:
            if have >= want:
                break
            chosen.append(document)
            have += len(document.encode())
    return chosen


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """The checkpoint as users find them: bf16, tied head not stored twice."""
    out.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    config = LlamaConfig.from_dict({**model.config.to_dict(), "dtype": "bfloat16", "use_cache": True})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out)
    GenerationConfig(bos_token_id=0, eos_token_id=0).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_bos_token": False,
                "add_prefix_space": False,
                "bos_token": EOS,
                "clean_up_tokenization_spaces": False,
                "eos_token": EOS,
                "model_max_length": model.config.max_position_embeddings,
                "tokenizer_class": "PreTrainedTokenizerFast",
                "unk_token": EOS,
            },
            indent=2,
        )
        + "\n"
    )


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: torch.Tensor, window: int) -> float:
    """Non-overlapping windows, every token but the first of each scored."""
    model.eval()
    loss, count = 0.0, 0
    for start in range(0, len(ids) - window + 1, window):
        piece = ids[start : start + window][None]
        loss += model(piece, labels=piece).loss.item() * (window - 1)
        count += window - 1
    model.train()
    return math.exp(loss / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int)
    length.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--limit", type=int, default=1_000_000, help="characters taken of each file at most")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256, help="every fourth batch: twice as long, half the rows")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--adamw", action="store_true", help="AdamW for all, rather than Muon for the blocks' matrices")
    parser.add_argument("--bf16", action="store_true", help="matrix products in bf16: twice as fast with AVX512_BF16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    shuffle = random.Random(args.seed)

    sources = [documents(path, args.limit) for path in args.text]
    held = [group[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] for group in sources]
    # A text that occurs twice in a source must not be on both sides.
    aside = {hashlib.sha256(d.encode()).digest() for group in held for d in group}
    kept = [[d for d in group if hashlib.sha256(d.encode()).digest() not in aside] for group in sources]
    shares = [1 / len(sources)] * len(sources)

    args.out.mkdir(parents=True, exist_ok=True)
    calibration = cut(kept, shares, 200_000)
    shuffle.shuffle(calibration)
    (args.out / "calibration.txt").write_text(f"\n{SEPARATOR}\n".join(calibration) + "\n", encoding="utf-8")
    evaluation = cut(held, shares, 130_000)
    shuffle.shuffle(evaluation)
    evaluation_text = "\n\n".join(evaluation) + "\n"
    (args.out / "evaluation.txt").write_text(evaluation_text, encoding="utf-8")

    training = [d for group in kept for d in group]
    tokenizer = train_tokenizer(training, args.vocab)
    shuffle.shuffle(training)
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(
        # Both ways documents meet in practice: the end-of-text token, and a blank line.
        [d + (EOS if i % 2 else "\n\n") for i, d in enumerate(training)]
    ):
        stream.extend(encoding.ids)
    stream_ids = torch.tensor(stream)
    evaluation_ids = torch.tensor(tokenizer.encode(evaluation_text).ids)
    print(f"{len(training)} documents, {len(stream_ids)} training tokens, {len(evaluation_ids)} held out", flush=True)

    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    if not args.adamw:
        # Orthogonalized momentum for the blocks' matrices: about half the steps to the same loss.
        table = [p for p in matrices if p is model.model.embed_tokens.weight]
        matrices = [p for p in matrices if p is not model.model.embed_tokens.weight]
        optimizers = [
            torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(table + vectors, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
    else:
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizers = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)]

    steps = args.steps
    started = timed = time.monotonic()
    losses = []
    step = 0
    while steps is None or step < steps:
        long = step % 4 == 3
        rows, width = (args.batch // 2, args.seq_len * 2) if long else (args.batch, args.seq_len)
        at = torch.randint(0, len(stream_ids) - width, (rows,))
        batch = torch.stack([stream_ids[a : a + width] for a in at.tolist()])
        warm = min(1.0, (step + 1) / 60)
        done = 0.0 if steps is None else step / steps
        lr = args.lr * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step += 1
        if step == 4:
            timed = time.monotonic()
        if steps is None and step == 24:
            each = (time.monotonic() - timed) / 20
            steps = max(60, int((args.minutes * 60 - (time.monotonic() - started)) / each) + 24)
            print(f"{each:.2f} s a step: {steps} steps", flush=True)
        if step % 50 == 0:
            mean = sum(losses[-50:]) / 50
            print(f"step {step}/{steps}  loss {mean:.3f}  lr {lr:.2e}  {time.monotonic() - started:.0f} s", flush=True)
        if step % 250 == 0 and step != steps:
            save(model, tokenizer, args.out / "checkpoint")

    seconds = time.monotonic() - started
    save(model, tokenizer, args.out / "model")
    # The figure of the weights as stored, not of the ones in memory.
    stored = load_file(args.out / "model" / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()}, strict=False)
    held_out = perplexity(model, evaluation_ids, 512)
    report = {
        "files": [path.name for path in args.text],
        "documents": len(training),
        "tokens_in_text": len(stream_ids),
        "tokens_seen": steps * args.batch * args.seq_len,
        "steps": steps,
        "batch": args.batch,
        "seq_len": args.seq_len,
        "optimizer": "adamw" if args.adamw else "muon",
        "lr": args.lr,
        "bf16_products": args.bf16,
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "final_loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
        "held_out_tokens": len(evaluation_ids),
        "held_out_perplexity_512": round(held_out, 3),
        "seconds": round(seconds),
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
