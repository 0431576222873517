"""Compile the kernel for a GPU that need not be there, and print what came out, a line per mode.

python tests/bench/compile_kernel.py 90          sm_90 (H100, H200); 80 is the A100

Every mode is compiled for GPT-2's vocabulary, 50257, which is odd, and for 50304: whether a number
is a multiple of 16 is all that Triton sees of it.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import kernels  # noqa: E402

MODES = [("statistics", True), ("exponentials", False), ("gradients", True)]
REGISTERS, SHARED = 65536, {80: 166912, 90: 232448}  # of one multiprocessor, shared ones in bytes


def compile_kernel(capability: int, mode: str, entropy: bool, dtype: torch.dtype, V: int) -> dict:
    """Registers, shared memory, tensor-core instructions and stores of one mode of the kernel."""
    fn = kernels._tile_kernel
    names = fn.arg_names
    block, options = kernels._tile(dtype, SHARED[capability])
    constants = {"CHANNELS": 768, "MODE": mode, "ENTROPY": entropy, **block}
    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    types = {name: "*fp32" for name in names if name.isupper()}
    types |= {name: "i32" for name in names if name.startswith("n_")}
    types |= dict(OUT=f"*{short}", out_stride="i32", scale="fp32")
    # What a launch would find to be multiples of 16: see _for_kernel and the kernel's decorator.
    aligned = ["OUT", "out_stride"] + (["n_tokens"] if V % 16 == 0 else [])
    for name, rows in (("X", block["BLOCK_N"]), ("W", block["BLOCK_V"])):
        if block["TMA"]:
            types[name] = f"tensordesc<{short}[{rows}, {block['BLOCK_C']}]>"
        else:
            types[name] = f"*{short}"
            aligned.append(name)
    types |= {name: "constexpr" for name in constants}
    source = ASTSource(
        fn,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage, code = (
            subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True)
            for what in ("--dump-resource-usage", "--dump-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    threads = 32 * options["num_warps"]
    shared = kernel.metadata.shared
    return {
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": V,
        "registers": registers,  # of a thread, given out in eights
        "stack_bytes": stack,
        "shared_bytes": shared,
        "programs_at_a_time": min(
            REGISTERS // (8 * math.ceil(registers / 8) * threads),
            (SHARED[capability] + 1024) // (shared + 1024),
        ),
        "instructions": sorted(set(re.findall(r"wgmma|mma\.sync|bulk\.tensor", kernel.asm["ptx"]))),
        # STG.E stores 4 bytes of a thread, STG.E.U16 2, STG.E.128 16
        "stores": sorted(set(re.findall(r"\bSTG\.E[A-Z0-9.]*", code.stdout))),
    }


if __name__ == "__main__":
    for dtype, V in [(torch.bfloat16, 50257), (torch.bfloat16, 50304), (torch.float32, 50257)]:
        for mode, entropy in MODES:
            result = compile_kernel(int(sys.argv[1]), mode, entropy, dtype, V)
            print(json.dumps(result), flush=True)
