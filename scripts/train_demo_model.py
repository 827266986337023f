"""Train the small mixture-of-experts model that the package carries.

One command, one thread, no network; ``demo_corpus.py`` gathers the text. ::

    python scripts/train_demo_model.py --out src/halfbyte/demo_model

The architecture is Qwen3.5-MoE (Gated DeltaNet and full attention, routed experts, a shared expert) as
transformers has it.  After the main model, a multi-token-prediction head is trained on the frozen main
model.  The folder written has the published layout: fused three-dimensional experts, ``mtp.*``
tensors, BF16, one ``model.safetensors``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from demo_corpus import END, corpus, python_licence, train_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeDecoderLayer, Qwen3_5MoeRMSNorm

WINDOW = 256
BALANCE_WEIGHT = 0.01
DROPOUT = 0.1
EXPERTS, TOP = 16, 4
CHAT_TEMPLATE = "{%- for message in messages %}{{- message.content + '\\n\\n' }}{%- endfor %}\n"
CONFIG = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "dtype": "bfloat16",
    "vocab_size": 1024,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 64,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
    },
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "Qwen2Tokenizer",
    "add_prefix_space": False,
    "bos_token": None,
    "eos_token": END,
    "pad_token": END,
    "unk_token": None,
    "model_max_length": 2048,
    "clean_up_tokenization_spaces": False,
}
GENERATION_CONFIG = {"eos_token_id": 0, "pad_token_id": 0, "do_sample": False}
README = """# Demo model

A small language model of the Qwen3.5-MoE architecture ({parameters:,} parameters with its
multi-token-prediction head, BF16): three Gated DeltaNet layers and one of full attention, each with
{experts} routed experts (top {top}) and a shared expert. It was trained from scratch with

    {command}

on text that every Python installation carries: the documentation topics of `pydoc_data.topics` and the
docstrings of the standard library's sources, here those of Python {python} ({train_tokens:,} tokens
of its own {vocab}-token vocabulary; torch {torch}, one CPU thread, fixed seeds). `heldout.txt`
({heldout_bytes:,} bytes) holds the topics it did not see:
{held}.
Paragraphs that other texts share with these were left out of the training.

Held-out perplexity per token, in windows of {window} tokens: **{perplexity:.2f}** (token frequencies
alone: {unigram:.0f}). The multi-token-prediction head names the token after the next one right at
{second:.1%} of the positions. Of the held-out tokens, the busiest expert of any layer gets {most:.2f} times an
even share, the idlest {least:.2f} times. Learning rate, dropout and the number of
steps were chosen after five other runs measured on the same text; without dropout, more steps overfit.

The model's only use is to try and to test quantization where nothing can be downloaded; it knows nothing.
`heldout.txt` is text of the Python documentation, copyright Python Software Foundation, under the licence
in `LICENSE-python.txt`. Weights, tokenizer and configuration have the licence of this package.
"""

LossOf = Callable[[Tensor], tuple[Tensor, Tensor]]


def balance_loss(router_logits: tuple[Tensor, ...]) -> Tensor:
    """Switch-Transformer load balance of [tokens, experts] logits, mean over layers; 1.0 is an even load."""
    losses = []
    for logits in router_logits:
        probabilities = logits.softmax(-1)
        chosen = probabilities.topk(TOP, -1).indices
        load = functional.one_hot(chosen, EXPERTS).float().mean((0, 1))
        losses.append(EXPERTS * (load * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def _drop(module: nn.Module, _inputs: object, output: Tensor | tuple) -> Tensor | tuple:
    if isinstance(output, tuple):
        return functional.dropout(output[0], DROPOUT, module.training), *output[1:]
    return functional.dropout(output, DROPOUT, module.training)


def add_dropout(layers: nn.ModuleList) -> None:
    """Drop out what attention and experts add to the residual stream: the text is short and is seen often."""
    for layer in layers:
        attention = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
        for part in (attention, layer.mlp):
            part.register_forward_hook(_drop)


class MultiTokenHead(nn.Module):
    """Predicts token t+2 from the main model's output at t and the embedding of token t+1.

    Its layer starts as a copy of the main model's full-attention layer.
    """

    def __init__(self, model: Qwen3_5MoeForCausalLM) -> None:
        super().__init__()
        hidden, eps = model.config.hidden_size, model.config.rms_norm_eps
        full = model.config.layer_types.index("full_attention")
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([Qwen3_5MoeDecoderLayer(model.config, full)])
        self.layers[0].load_state_dict(copy.deepcopy(model.model.layers[full].state_dict()))
        self.norm = Qwen3_5MoeRMSNorm(hidden, eps=eps)
        self.pre_fc_norm_embedding = Qwen3_5MoeRMSNorm(hidden, eps=eps)
        self.pre_fc_norm_hidden = Qwen3_5MoeRMSNorm(hidden, eps=eps)
        self.router_logits: tuple[Tensor, ...] = ()
        self.layers[0].mlp.gate.register_forward_hook(self._record)

    def _record(self, _module: nn.Module, _inputs: object, outputs: tuple[Tensor, ...]) -> None:
        self.router_logits = (outputs[0],)

    def forward(self, model: Qwen3_5MoeForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, T] -> (logits [B, T-2, V] of the tokens 2.., those tokens [B, T-2])."""
        with torch.no_grad():
            hidden = model.model(tokens[:, :-2], use_cache=False).last_hidden_state
            embedded = model.model.embed_tokens(tokens[:, 1:-1])
        joined = torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)], -1)
        states = self.fc(joined)
        positions = torch.arange(states.shape[1]).expand(3, len(states), -1)
        rotary = model.model.rotary_emb(states, positions)
        # without a mask the attention is causal
        states = self.layers[0](states, position_embeddings=rotary, attention_mask=None)
        return model.lm_head(self.norm(states)), tokens[:, 2:]


def batches(stream: Tensor, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Shuffled windows [size, WINDOW+1] of the stream; every pass starts at another offset."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        offset = int(torch.randint(WINDOW, (1,), generator=generator))
        count = (len(stream) - offset - 1) // WINDOW
        order = torch.randperm(count, generator=generator) * WINDOW + offset
        for start in range(0, count - size + 1, size):
            if done == steps:
                return
            done += 1
            yield torch.stack([stream[i : i + WINDOW + 1] for i in order[start : start + size].tolist()])


def train(module: nn.Module, loss_of: LossOf, data: Iterator[Tensor], steps: int, rate: float) -> None:
    """AdamW with warm-up and a cosine; weight decay on matrices only."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    warm = max(1, min(100, steps // 10))
    began, mean = time.time(), 0.0
    for step, batch in enumerate(data):
        cosine = 0.03 + 0.97 * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm, cosine)
        loss, balance = loss_of(batch)
        (loss + BALANCE_WEIGHT * balance).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = 0.98 * mean + 0.02 * loss.item() if step else loss.item()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.time() - began
            print(f"step {step:5d}  loss {mean:.4f}  balance {balance.item():.3f}  {seconds:.0f} s", flush=True)


def export(model: Qwen3_5MoeForCausalLM, head: MultiTokenHead, file: Path) -> None:
    """Write all tensors; transformers itself would drop ``mtp.*`` and split the experts."""
    tensors = dict(model.state_dict()) | {f"mtp.{name}": value for name, value in head.state_dict().items()}
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in sorted(tensors.items())}
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)


@torch.no_grad()
def measure(model: Qwen3_5MoeForCausalLM, head: MultiTokenHead, ids: Tensor) -> dict[str, float]:
    """Held-out numbers over whole windows of WINDOW tokens, each window on its own, in FP32 arithmetic."""
    losses, hits = [], []
    counts = torch.zeros(CONFIG["num_hidden_layers"], EXPERTS)
    for window in ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW).split(8):
        result = model(window, use_cache=False, output_router_logits=True)
        logits = result.logits[:, :-1].flatten(0, 1)
        losses.append(functional.cross_entropy(logits, window[:, 1:].flatten(), reduction="none"))
        chosen = torch.stack(result.router_logits).topk(TOP, -1).indices
        counts += functional.one_hot(chosen, EXPERTS).sum((1, 2))
        logits, target = head(model, window)
        hits.append((logits.argmax(-1) == target).float().flatten())
    share = counts / counts.mean(-1, keepdim=True)
    perplexity = torch.cat(losses).mean().exp().item()
    second = torch.cat(hits).mean().item()
    return {"perplexity": perplexity, "second": second, "least": share.min().item(), "most": share.max().item()}


def unigram_perplexity(train_ids: list[int], ids: list[int]) -> float:
    """Perplexity of the training text's token frequencies, one added to each count."""
    counts = Counter(train_ids)
    total = len(train_ids) + CONFIG["vocab_size"]
    return math.exp(-sum(math.log((counts[i] + 1) / total) for i in ids) / len(ids))


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train, write the folder, load it back with transformers and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1800, help="steps of the main model")
    parser.add_argument("--mtp-steps", type=int, default=600, help="steps of the multi-token-prediction head")
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {WINDOW} tokens per step")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    topics, docstrings, held_text, held_names = corpus()
    texts = topics * 2 + docstrings  # what is measured is topics, so they count twice
    tokenizer = train_tokenizer(texts, CONFIG["vocab_size"])
    tokenizer.save(str(out / "tokenizer.json"))
    for name, value in (("config", CONFIG), ("generation_config", GENERATION_CONFIG)):
        _write_json(out / f"{name}.json", value)
    _write_json(out / "tokenizer_config.json", TOKENIZER_CONFIG)
    for name, text in (
        ("chat_template.jinja", CHAT_TEMPLATE),
        ("heldout.txt", held_text),
        ("LICENSE-python.txt", python_licence()),
    ):
        (out / name).write_text(text, encoding="utf-8")
    train_ids = [i for text in texts for i in [0, *tokenizer.encode(text).ids]]
    held_ids = tokenizer.encode(held_text).ids
    stream = torch.tensor(train_ids)
    print(f"{len(train_ids):,} training tokens, {len(held_ids):,} held out", flush=True)

    torch.manual_seed(0)
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**CONFIG)).float().train()
    add_dropout(model.model.layers)
    model.model.embed_tokens.register_forward_hook(_drop)

    def main_loss(batch: Tensor) -> tuple[Tensor, Tensor]:
        result = model(batch[:, :-1], use_cache=False, output_router_logits=True)
        loss = functional.cross_entropy(result.logits.flatten(0, 1), batch[:, 1:].flatten())
        return loss, balance_loss(result.router_logits)

    train(model, main_loss, batches(stream, options.batch, options.steps, 1), options.steps, options.rate)
    # the head learns on the weights as they will be stored
    model = model.bfloat16().float().eval().requires_grad_(False)
    head = MultiTokenHead(model).train()
    add_dropout(head.layers)

    def head_loss(batch: Tensor) -> tuple[Tensor, Tensor]:
        logits, target = head(model, batch)
        loss = functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        return loss, balance_loss(head.router_logits)

    data = batches(stream, options.batch, options.mtp_steps, 2)
    train(head, head_loss, data, options.mtp_steps, options.rate / 2)
    export(model, head, out / "model.safetensors")

    loaded, keys = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    if keys["missing_keys"] or keys["unexpected_keys"] or keys["mismatched_keys"]:
        raise SystemExit(f"the folder does not load completely: {keys}")
    if AutoTokenizer.from_pretrained(out)(held_text)["input_ids"] != held_ids:
        raise SystemExit("AutoTokenizer does not split the text as the tokenizer used in training")
    numbers = measure(loaded.eval(), head.bfloat16().float().eval(), torch.tensor(held_ids))
    command = "python scripts/train_demo_model.py --out src/halfbyte/demo_model"
    for name in ("steps", "mtp_steps", "batch", "rate"):
        if getattr(options, name) != parser.get_default(name):
            command += f" --{name.replace('_', '-')} {getattr(options, name)}"
    report = README.format(
        **numbers,
        parameters=sum(p.numel() for part in (loaded, head) for p in part.parameters()),
        experts=EXPERTS,
        top=TOP,
        command=command,
        python=platform.python_version(),
        torch=torch.__version__.split("+")[0],
        train_tokens=len(train_ids),
        vocab=CONFIG["vocab_size"],
        heldout_bytes=len(held_text.encode()),
        held=", ".join(f"`{name}`" for name in held_names),
        window=WINDOW,
        unigram=unigram_perplexity(train_ids, held_ids),
    )
    (out / "README.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
