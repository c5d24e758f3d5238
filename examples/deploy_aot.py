"""A converted model as an AOTInductor package, run where attnres_fx is not installed.

    python examples/deploy_aot.py --output model.pt2

Converts the example GPT, exports it again, compiles it ahead of time, and lets another process, in which
attnres_fx cannot be imported, load the package and compute the same numbers.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from small_gpt import GPTConfig, SmallGPT
from torch.export import Dim

import attnres_fx as ax

ELSEWHERE = """
import sys
sys.modules["attnres_fx"] = None  # importing it fails here, as where it is not installed
import torch

package, data = sys.argv[1:]
ids, expected = torch.load(data, weights_only=True)
outputs = torch._inductor.aoti_load_package(package)(ids)
print(f"largest difference {(outputs - expected).abs().max().item():.1e}")
assert torch.allclose(outputs, expected, atol=1e-5)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--output", type=Path, help="where the package goes; nowhere by default")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = SmallGPT(GPTConfig(layers=options.layers, width=32, context=64)).eval()
    ids = torch.randint(0, 256, (2, 16))
    converted = ax.convert(model, (ids,), config=ax.AttnResConfig(variant="block", num_blocks=2))
    for read in converted.attnres.reads:  # as training would leave them
        torch.nn.init.normal_(read.query, std=0.5)

    exported = torch.export.export(converted, (ids,), dynamic_shapes={"ids": {0: Dim.AUTO, 1: Dim.AUTO}})
    with tempfile.TemporaryDirectory() as folder:
        package = str(options.output or Path(folder) / "model.pt2")
        torch._inductor.aoti_compile_and_package(exported, package_path=package)
        other = torch.randint(0, 256, (3, 40))
        data = str(Path(folder) / "data.pt")
        torch.save((other, converted(other).detach()), data)
        command = [sys.executable, "-c", ELSEWHERE, package, data]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        print(done.stdout.strip() or done.stderr.strip())
        if done.returncode:
            raise SystemExit("the package does not agree with the converted model")
    print("the package agrees with the converted model, without attnres_fx")


if __name__ == "__main__":
    main()
