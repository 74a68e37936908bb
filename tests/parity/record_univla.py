"""Records UniVLA's public PyTorch code on a tiny checkpoint; writes `univla_tiny` in `fixtures/`.

    python tests/parity/record_univla.py PUBLIC REFERENCE

PUBLIC is a checkout of github.com/OpenDriveLab/UniVLA (recorded at 0ab9e9d), REFERENCE the folder
of recorded checkpoints that `trim.py` takes. It needs what the public code pins (timm 0.9.10,
transformers 4.40.1, tokenizers 0.19.1; einops) and PyTorch, and nothing of this repository.

The backbone is that of `openvla_realvocab_bf16`: the public numbers (256 patches, tokens 29871,
32000 and 32001 to 32016) hold unchanged. Changed of the public code are sizes alone: the widths of
the towers, and of the action decoder (hidden_dim 128, so two heads, inputs of 16, an MLP of half
the width), whose numbers stand in its text. Weights are random; rows of the output layer are scaled
so that latent tokens win, and the end of the sequence would win where it is not forbidden.
"""

import ast
import functools
import importlib
import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

FIXTURES = Path(__file__).parent / "fixtures"
WINDOW = 12
HIDDEN_DIM = 128
MLP_RATIO = 0.5
FIRST_LATENT, LATENTS = 32001, 16
EOS, EMPTY, PAD = 2, 29871, 32000
LIKE_EOS = 9
KEY = "libero_spatial_no_noops"
TASK = "pick up the black bowl between the plate and the ramekin and place it on the plate"
# Places of long sequences that are kept, as in `trim.py`.
PLACES_STEP = 4
STEPS = 4  # of the episode


def main() -> None:
    """Builds the checkpoint, runs it, and writes both files."""
    public, reference = (Path(argument) for argument in sys.argv[1:3])
    source = reference / "openvla_realvocab_bf16"
    settings = json.loads((source / "config.json").read_text())
    archs = json.loads((source / "tiny_vision_archs.json").read_text())
    tokenizer = _tokenizer(json.loads((reference / "openvla_tiny/tokenizer.json").read_text()))
    torch.manual_seed(0)
    sys.path.insert(0, str(public / "prismatic/extern"))
    timm.create_model = functools.partial(_create, archs=archs)
    modeling = importlib.import_module("hf.modeling_prismatic")
    processing = importlib.import_module("hf.processing_prismatic")
    model = _model(modeling, settings, source)
    net, ensemble_class = _decoder(public)
    processor = processing.PrismaticProcessor.__new__(processing.PrismaticProcessor)
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"]
    )
    processor.image_processor = processing.PrismaticImageProcessor(
        use_fused_vision_backbone=True,
        image_resize_strategy="resize-naive",
        input_sizes=[(3, 224, 224)] * 2,
        interpolations=["bicubic"] * 2,
        means=[(0.485, 0.456, 0.406), (0.5,) * 3],
        stds=[(0.229, 0.224, 0.225), (0.5,) * 3],
    )
    constants = json.loads((source / "preprocessor_config.json").read_text())
    processor.image_processor.tvf_normalize_params = constants["tvf_normalize_params"]

    stopped = False
    arrays, noise, samples = {}, {}, []
    ensemble = ensemble_class(WINDOW)
    ensemble.net = net
    action = settings["norm_stats"][KEY]["action"]
    mask = np.array(action["mask"])
    high, low = np.array(action["q99"]), np.array(action["q01"])
    history = ""
    for step in range(STEPS):
        image = _image(step)
        prompt = f"In: What action should the robot take to {TASK.lower()}?\nOut:"
        if history:
            prompt = prompt.replace("?", f"? History action {history}")
        inputs = dict(processor(prompt, Image.fromarray(image)))
        exact, found = (_run(model, net, inputs, dtype) for dtype in (torch.float64, torch.float32))
        acted = ensemble(
            torch.from_numpy(found["latent_states"]),
            torch.from_numpy(found["visual_states"]),
            mask, low, high,
        )  # fmt: skip
        chunk = found["action_decoder"].reshape(WINDOW, 7).astype(np.float64)
        chunk = np.where(mask, 0.5 * (chunk + 1) * (high - low) + low, chunk)
        found |= {"input_ids": inputs["input_ids"].numpy(), "unnormalized_chunk": chunk}
        found |= {"ensembled_action": acted, "image": image}
        prefix = f"sample{step}_" if step else ""
        kept = found if not step else {k: found[k] for k in _EACH}
        arrays |= {f"{prefix}{k}": v for k, v in kept.items()}
        for name in exact.keys() & kept.keys():
            if found[name].dtype == np.float32:
                difference = float(np.abs(found[name] - exact[name]).max())
                noise[f"{prefix}{name}"] = difference
        samples.append({"task": TASK, "history": history})
        tokens = found["latent_ids"]
        print(step, tokens, found["stop_would_win"], found["margin"], acted)
        assert (tokens >= FIRST_LATENT).all()
        stopped |= found["stop_would_win"].any()
        history = "".join(f"<ACT_{token - FIRST_LATENT}>" for token in tokens)
    assert stopped, "the end of the sequence is never the most likely token"
    # Longer than a chunk, so that predictions fall out of the window.
    small = ensemble_class(3)
    chunks = np.random.default_rng(0).uniform(-1, 1, (8, 3, 7)).astype(np.float32)
    small.net = _Given(chunks)
    zero = torch.zeros(1)
    arrays["ensemble_chunks"] = chunks
    arrays["ensemble_actions"] = np.stack(
        [small(zero, zero, np.zeros(7, bool), 0.0, 0.0) for _ in chunks]
    )
    meta = {
        "unnorm_key": KEY,
        "samples": samples,
        "torch": torch.__version__,
    }
    described = {"meta": meta, "noise": noise, "mutations": {}}
    arrays["described"] = np.frombuffer(json.dumps(described).encode(), np.uint8)
    np.savez_compressed(FIXTURES / "univla_tiny.npz", **arrays)
    _write(source, settings, archs, tokenizer, model, net)


class _Given(nn.Module):
    """A decoder that gives one chunk after the other."""

    def __init__(self, chunks: np.ndarray):
        super().__init__()
        self._chunks = iter(chunks)

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(next(self._chunks))


# Recorded for every step of the episode; the first has all stages.
_EACH = (
    "image", "input_ids", "latent_ids", "latent_states", "stop_would_win", "action_decoder",
    "unnormalized_chunk", "ensembled_action",
)  # fmt: skip


def _create(name: str, *, archs: dict, **given: object) -> VisionTransformer:
    """Instead of `timm.create_model`: a tower of the tiny sizes."""
    sizes = {k: v for k, v in archs[name].items() if k not in ("act_layer", "norm_eps")}
    options = {**sizes, "num_classes": 0, "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6)}
    options.setdefault("global_pool", "token")
    return VisionTransformer(**{**options, "img_size": given["img_size"]})


def _model(modeling, settings: dict, source: Path):
    configuration = sys.modules["hf.configuration_prismatic"]
    ids = settings["timm_model_ids"]
    configuration.VISION_BACKBONE_TO_TIMM_ID[settings["vision_backbone_id"]] = ids
    drop = (
        "architectures", "auto_map", "timm_model_ids", "timm_override_act_layers", "image_sizes",
        "hf_llm_id", "model_type",
    )  # fmt: skip
    config = configuration.OpenVLAConfig(**{k: v for k, v in settings.items() if k not in drop})
    model = modeling.OpenVLAForActionPrediction._from_config(
        config, attn_implementation="sdpa", torch_dtype=torch.float32
    )
    model.generation_config = GenerationConfig.from_pretrained(source)
    weights = {}
    for shard in sorted(source.glob("*.safetensors")):
        weights |= load_file(shard)
    # Only rows that occur, so that the fixture is small: all others are zero.
    generator = torch.Generator().manual_seed(1)
    latents = slice(FIRST_LATENT, FIRST_LATENT + LATENTS)
    head = weights["language_model.lm_head.weight"]
    rows = torch.zeros_like(head)
    rows[latents] = torch.randn(LATENTS, head.shape[1], generator=generator).to(rows.dtype)
    # Where one of the latent tokens is the most likely, the end of the sequence is more so.
    rows[EOS] = 1.5 * rows[FIRST_LATENT + LIKE_EOS]
    weights["language_model.lm_head.weight"] = rows
    name = "language_model.model.embed_tokens.weight"
    embedding = weights[name].clone()
    embedding[latents] = torch.randn(LATENTS, head.shape[1], generator=generator).to(rows.dtype)
    embedding[latents] *= 2 * weights[name][:1000].float().std().to(rows.dtype)
    weights[name] = embedding
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    return model.float().eval()


def _decoder(public: Path):
    """The public action decoder at a small width, with temporal ensembling around it."""
    sys.path.insert(0, str(public / "prismatic/models/policy"))
    blocks = importlib.import_module("transformer_utils")

    def small(*, vis_dim: int, **sizes: int) -> nn.Module:
        assert vis_dim == 4096
        return blocks.MAPBlock(vis_dim=16, mlp_ratio=MLP_RATIO, **sizes)

    scope = {"torch": torch, "nn": nn, "np": np, "MAPBlock": small}
    scope["ActionDecoderHead"] = lambda window_size: nn.Identity()
    files = {
        "ActionDecoder": public / "vla-scripts/finetune_libero.py",
        "Ensemble": public / "experiments/robot/libero/run_libero_eval.py",
    }
    classes = {}
    for name, file in files.items():
        # The files import simulators and loggers: their class alone is run.
        tree = ast.parse(file.read_text())
        definition = next(
            n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "ActionDecoder"
        )
        exec(compile(ast.Module([definition], []), str(file), "exec"), scope)
        classes[name] = scope["ActionDecoder"]
    net = classes["ActionDecoder"](window_size=WINDOW, hidden_dim=HIDDEN_DIM)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            value = 1 + 0.3 * noise if name.endswith(".g") else noise * fan_in**-0.5
            if name.endswith("latents"):
                value = 0.5 * noise
            elif parameter.dim() == 1 and not name.endswith(".g"):
                value = 0.3 * noise
            # Values of bfloat16 compress to half, and are float32 as the public file's.
            parameter.copy_(value.bfloat16().float())
    return net.eval(), classes["Ensemble"]


def _image(step: int) -> np.ndarray:
    """An image of coarse blocks, which compresses well."""
    blocks = np.random.default_rng(step).integers(0, 256, (14, 14, 3))
    return np.kron(blocks, np.ones((16, 16, 1), np.int64)).astype(np.uint8)


def _run(model, net, inputs: dict, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """One call of `predict_latent_action` and of the decoder, with what passes in between."""
    model, net = model.to(dtype), net.to(dtype)
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            seen.setdefault(name, []).append(output.detach())

        return hook

    language = model.language_model
    places = {
        "fused_patch_features": model.vision_backbone,
        "projector_output": model.projector,
        "llm_layer0_output": language.model.layers[0],
        "llm_final_norm_output": language.model.norm,
        "logits": language.lm_head,
    }
    handles = [module.register_forward_hook(keep(name)) for name, module in places.items()]
    for name, module in net.named_modules():
        handles.append(module.register_forward_hook(keep(f"action_decoder.{name}".rstrip("."))))
    with torch.no_grad():
        given = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
        latent, visual, ids = model.predict_latent_action(**given, unnorm_key=KEY, do_sample=False)
        chunk = net(latent, visual)
    for handle in handles:
        handle.remove()
    logits = torch.cat([x[:, -1] for x in seen.pop("logits")]).float().numpy()
    masked = logits.copy()
    masked[:, EOS] = -np.inf
    top = np.sort(masked, axis=1)
    found = {
        "latent_ids": ids[0].numpy(),
        "latent_states": latent.numpy(),
        "visual_states": visual.numpy(),
        "logits_steps": logits[:, [EOS, *range(FIRST_LATENT, FIRST_LATENT + LATENTS)]],
        "stop_would_win": logits.argmax(axis=1) == EOS,
        "margin": top[:, -1] - top[:, -2],
    }
    for name, outputs in seen.items():
        if name.startswith("action_decoder"):
            assert len(outputs) == 1, name
            long = outputs[0].dim() == 3 and outputs[0].shape[1] > 200
            found[name] = outputs[0][:, :: PLACES_STEP**2 if long else 1].numpy()
            continue
        first, *steps = (x.numpy() for x in outputs)
        found[name] = first[:, ::PLACES_STEP]
        if steps:
            found[f"{name}_decode"] = np.concatenate(steps, axis=1)
    assert np.array_equal(found["action_decoder"], chunk.numpy())
    model.float(), net.float()
    return found


def _tokenizer(described: dict):
    """The synthetic Llama-like tokenizer with the public ids of its special tokens."""
    from tokenizers import Tokenizer

    model = described["model"]
    vocabulary = {token: i for token, i in model["vocab"].items() if i < 192}
    vocabulary |= {f"<{i}>": i for i in (150, *range(192, PAD))}  # no holes
    del vocabulary[f"<{EMPTY}>"]
    vocabulary["\u2581"] = EMPTY
    special = {"<PAD>": PAD, **{f"<ACT_{i}>": FIRST_LATENT + i for i in range(LATENTS)}}
    like = next(t for t in described["added_tokens"] if t["content"] == "<PAD>")
    kept = [t for t in described["added_tokens"] if t is not like]
    added = [{**like, "id": i, "content": token} for token, i in special.items()]
    model = {**model, "vocab": vocabulary | special}
    tokenizer = Tokenizer.from_str(
        json.dumps({**described, "model": model, "added_tokens": kept + added})
    )
    assert tokenizer.token_to_id("<ACT_15>") == FIRST_LATENT + 15
    return tokenizer


def _write(source: Path, settings: dict, archs: dict, tokenizer, model, net) -> None:
    """The checkpoint as the public scripts leave it: bfloat16 weights, a float32 decoder."""
    state = model.bfloat16().state_dict()
    arrays = np.load(FIXTURES / "univla_tiny.npz")
    used = {1, EMPTY, *range(FIRST_LATENT, FIRST_LATENT + LATENTS)}
    used |= {
        int(i) for name in arrays.files if name.endswith("input_ids") for i in arrays[name].ravel()
    }
    embedding = state["language_model.model.embed_tokens.weight"]
    unused = torch.ones(len(embedding), dtype=torch.bool)
    unused[sorted(used)] = False
    embedding[unused] = 0
    for name, tensor in state.items():
        # Read by nobody: see `trim.py`.
        if "attn_pool" in name or ".blocks.2." in name or "featurizer.norm." in name:
            tensor.zero_()
    shard = "model-00001-of-00001.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, shard)}
    component = io.BytesIO()
    torch.save(net.state_dict(), component)
    statistics = {KEY: settings["norm_stats"][KEY]}
    settings = {**settings, "norm_stats": statistics}
    with zipfile.ZipFile(FIXTURES / "univla_tiny.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("config.json", json.dumps(settings, indent=1))
        archive.writestr("dataset_statistics.json", json.dumps(statistics, indent=1))
        archive.writestr("tiny_vision_archs.json", json.dumps(archs, indent=1))
        archive.write(source / "preprocessor_config.json", "preprocessor_config.json")
        archive.writestr("tokenizer.json", tokenizer.to_str())
        archive.writestr("model.safetensors.index.json", json.dumps(index, indent=1))
        archive.writestr(shard, save({n: t.contiguous() for n, t in state.items()}))
        archive.writestr("action_decoder-30000.pt", component.getvalue())


if __name__ == "__main__":
    main()
