"""The same matrix product by other libraries, on one thread, each in its own best settings.

PyTorch, OpenVINO and ggml are no dependencies: those that are not installed are left out.

    pip install -e '.[bench]'                                    # PyTorch and OpenVINO
    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python   # ggml, for this processor
"""

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# x [rows, k] -> a function that makes one call on the i-th copy of the weight and waits for it.
Product = Callable[[np.ndarray], Callable[[int], object]]
# Bytes of a weight -> how many copies are visited in turn.
Copies = Callable[[int], int]

# Of ggml's C API: element types, and where a tensor keeps what a repacking buffer found for it.
_TYPES = {"f32": 0, "q4_0": 2, "q8_0": 8, "q2_K": 10, "q4_K": 12}
_OBJECT_BYTES, _TENSOR_BYTES, _EXTRA_AT = 32, 336, 320
_WEIGHTS_USAGE = 1


def torch_products(c: int, k: int, copies: Copies) -> Iterator[tuple[str, Product]]:
    """bfloat16, the dynamic 8-bit linear layer (W8A8) and 4 bits in groups of 128."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    halves = [torch.randn(c, k).bfloat16() for _ in range(copies(2 * c * k))]

    def half(x: np.ndarray) -> Callable[[int], object]:
        given = torch.from_numpy(x).bfloat16()
        return lambda i: torch.nn.functional.linear(given, halves[i % len(halves)])

    yield "PyTorch bfloat16", half
    layers = []
    for _ in range(copies(c * k)):
        layer = torch.nn.Sequential(torch.nn.Linear(k, c, bias=False))
        layers.append(torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, torch.qint8))

    def dynamic(x: np.ndarray) -> Callable[[int], object]:
        given = torch.from_numpy(x)
        return lambda i: layers[i % len(layers)](given)

    yield "PyTorch dynamic int8 (W8A8)", dynamic
    if k % 128:
        return
    packed = torch._convert_weight_to_int4pack_for_cpu(
        torch.randint(0, 16, (c, k), dtype=torch.int32), 1
    )
    fours = [packed.clone() for _ in range(copies(c * k // 2))]
    scales = torch.full((k // 128, c, 2), 0.01, dtype=torch.bfloat16)

    def four(x: np.ndarray) -> Callable[[int], object]:
        given = torch.from_numpy(x).bfloat16()
        return lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(
            given, fours[i % len(fours)], 128, scales
        )

    yield "PyTorch int4, groups of 128", four


def openvino_products(c: int, k: int, copies: Copies) -> Iterator[tuple[str, Product]]:
    """int8 and int4 per channel, and int4 in groups of 128, with rounded inputs and without."""
    if importlib.util.find_spec("openvino") is None:
        return
    import openvino
    from openvino import opset13 as ops

    core, rng = openvino.Core(), np.random.default_rng(0)

    def model(bits: int, group: int | None) -> Any:
        x = ops.parameter([-1, k], np.float32)
        shape = [c, k] if group is None else [c, k // group, group]
        if bits == 4:
            values = openvino.Tensor(openvino.Type.i4, openvino.Shape(shape))
            values.data[:] = rng.integers(0, 256, values.data.shape).astype(values.data.dtype)
            weight = ops.constant(values)
        else:
            weight = ops.constant(rng.integers(-127, 128, shape).astype(np.int8))
        scale = np.full([c, *([1] if group is None else [k // group, 1])], 0.01, np.float16)
        scaled = ops.multiply(ops.convert(weight, "f16"), ops.constant(scale))
        if group is not None:
            scaled = ops.reshape(scaled, ops.constant(np.array([c, k], np.int64)), False)
        y = ops.matmul(x, ops.convert(scaled, "f32"), False, True)
        return openvino.Model([y], [x], "product")

    for bits, group in ((8, None), (4, None), (4, 128)):
        if group is not None and k % group:
            continue
        for label, settings in (
            ("default", {}),
            ("bfloat16 inputs", {
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_PRECISION_HINT": "bf16",
            }),
            ("int8 inputs", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}),
        ):  # fmt: skip
            options = {
                "INFERENCE_NUM_THREADS": 1,
                "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY",
                "ENABLE_CPU_PINNING": False,
            }
            requests = [
                core.compile_model(
                    model(bits, group), "CPU", options | settings
                ).create_infer_request()
                for _ in range(copies(bits * c * k // 8))
            ]

            def bound(x: np.ndarray, requests: list[Any] = requests) -> Callable[[int], object]:
                for request in requests:
                    request.set_input_tensor(openvino.Tensor(x))
                return lambda i: requests[i % len(requests)].infer()

            groups = "" if group is None else f", groups of {group}"
            yield f"OpenVINO int{bits}{groups}, {label}", bound


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Ggml:
    """ggml's CPU backend through its C API: graphs of one product each."""

    def __init__(self, folder: Path):
        """Loads the libraries below a folder."""
        self._libraries = [
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            for part in ("base", "cpu", "")
            for path in sorted(folder.rglob(f"libggml{'-' if part else ''}{part}.so"))[:1]
        ]
        if len(self._libraries) < 2:
            raise OSError(f"{folder}: no libggml-base.so and libggml-cpu.so")
        self.backend = self.call("ggml_backend_cpu_init", ctypes.c_void_p)
        self.call("ggml_backend_cpu_set_n_threads", None, self.backend, ctypes.c_int(1))
        overhead = self.call("ggml_tensor_overhead", ctypes.c_size_t)
        if overhead != _OBJECT_BYTES + _TENSOR_BYTES:
            raise OSError(f"{folder}: tensors of {overhead} bytes; another version of ggml")

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """Calls a function of the C API."""
        function = next(
            getattr(library, name) for library in self._libraries if hasattr(library, name)
        )
        function.restype = result
        return function(*(ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments))

    def repacking(self) -> int | None:
        """The buffer type that rearranges weights for the processor, if there is one."""
        device = self.call("ggml_backend_get_device", ctypes.c_void_p, self.backend)
        registry = self.call("ggml_backend_dev_backend_reg", ctypes.c_void_p, device)
        found = self.call(
            "ggml_backend_reg_get_proc_address", ctypes.c_void_p, registry,
            b"ggml_backend_dev_get_extra_bufts",
        )  # fmt: skip
        if not found:
            return None
        kind = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
        types = kind(found)(device)
        for buffer_type in iter_until_null(types):
            name = self.call("ggml_backend_buft_name", ctypes.c_char_p, buffer_type)
            if b"REPACK" in name:
                return buffer_type
        return None

    def context(self, tensors: int) -> int:
        """A context whose tensors are allocated in a buffer later."""
        size = (tensors + 64) * (_OBJECT_BYTES + _TENSOR_BYTES) + tensors * 8192
        return self.call("ggml_init", ctypes.c_void_p, _InitParams(size, None, True))

    def matrix(self, context: int, kind: str, inputs: int, rows: int) -> int:
        """A new tensor of `rows` rows."""
        return self.call(
            "ggml_new_tensor_2d", ctypes.c_void_p, context, ctypes.c_int(_TYPES[kind]),
            ctypes.c_int64(inputs), ctypes.c_int64(rows),
        )  # fmt: skip

    def allocate(self, context: int, buffer_type: int) -> int:
        """Memory for all tensors of a context."""
        return self.call(
            "ggml_backend_alloc_ctx_tensors_from_buft", ctypes.c_void_p, context, buffer_type
        )

    def fill(self, tensor: int, values: np.ndarray) -> None:
        """Sets a tensor, which a repacking buffer rearranges."""
        self.call(
            "ggml_backend_tensor_set", None, tensor, values.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(0), ctypes.c_size_t(values.nbytes),
        )  # fmt: skip

    def quantized(self, kind: str, weight: np.ndarray) -> np.ndarray:
        """Bytes of a matrix in one of ggml's types."""
        rows, inputs = weight.shape
        size = self.call(
            "ggml_row_size", ctypes.c_size_t, ctypes.c_int(_TYPES[kind]), ctypes.c_int64(inputs)
        )
        result = np.empty(rows * size, np.uint8)
        self.call(
            "ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int(_TYPES[kind]),
            weight.ctypes.data_as(ctypes.c_void_p), result.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(inputs), None,
        )  # fmt: skip
        return result


def iter_until_null(pointers: Any) -> Iterator[int]:
    """The entries of a C array that a null pointer ends."""
    number = 0
    while pointers[number]:
        yield pointers[number]
        number += 1


def ggml_products(
    c: int, k: int, copies: Copies, folder: Path | None = None
) -> Iterator[tuple[str, Product]]:
    """Its types of 2, 4 and 8 bits, as stored and, where there is a kernel, repacked.

    Args:
        c: output channels.
        k: inputs.
        copies: how many weights of a size.
        folder: where its libraries are; None: of an installed llama-cpp-python.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if folder is None and spec is not None:
        folder = Path(spec.origin or "").parent
    if folder is None or k % 256:  # types with K take rows of whole blocks of 256
        return
    ggml = Ggml(folder)
    plain = ggml.call("ggml_backend_get_default_buffer_type", ctypes.c_void_p, ggml.backend)
    weight = np.random.default_rng(0).normal(size=(c, k)).astype(np.float32)
    for kind in ("q8_0", "q4_0", "q4_K", "q2_K"):
        data = ggml.quantized(kind, weight)
        for label, buffer_type in (("", plain), (", repacked", ggml.repacking())):
            if buffer_type is None:
                continue
            count = copies(data.nbytes)
            context = ggml.context(count)
            weights = [ggml.matrix(context, kind, k, c) for _ in range(count)]
            buffer = ggml.allocate(context, buffer_type)
            ggml.call("ggml_backend_buffer_set_usage", None, buffer, ctypes.c_int(_WEIGHTS_USAGE))
            repacked = ctypes.c_void_p.from_address(weights[0] + _EXTRA_AT).value
            if label and not repacked:
                continue
            for tensor in weights:
                ggml.fill(tensor, data)

            def bound(x: np.ndarray, weights: list[int] = weights) -> Callable[[int], object]:
                context = ggml.context(2 * len(weights) + 1)
                inputs = ggml.matrix(context, "f32", x.shape[1], x.shape[0])
                graphs = []
                for tensor in weights:
                    graph = ggml.call(
                        "ggml_new_graph_custom", ctypes.c_void_p, context, ctypes.c_size_t(4),
                        ctypes.c_bool(False),
                    )  # fmt: skip
                    product = ggml.call("ggml_mul_mat", ctypes.c_void_p, context, tensor, inputs)
                    ggml.call("ggml_build_forward_expand", None, graph, product)
                    graphs.append(graph)
                ggml.allocate(context, plain)
                ggml.fill(inputs, np.ascontiguousarray(x))
                return lambda i: ggml.call(
                    "ggml_backend_graph_compute", ctypes.c_int, ggml.backend,
                    graphs[i % len(graphs)],
                )  # fmt: skip

            yield f"ggml {kind}{label}", bound
