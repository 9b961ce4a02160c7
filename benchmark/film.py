"""A short film (GIF) of the policy that a robot's run has learned.

    python benchmark/film.py RUN [--output FILE]      # needs pip install -e '.[plot]'

RUN is a folder of aihf_sac_mujoco.py or `rlhf_baseline.py mujoco`; the policy acts without noise.
MuJoCo renders; on a machine without a screen set MUJOCO_GL=egl or osmesa.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from torch.optim.swa_utils import AveragedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from aihf_sac_mujoco import Actor
from data_gen import read


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # a run folder
    output: Path | None = None  # the film; default film.gif in the run's folder
    seconds: float = 4.0  # of the robot's time
    first_second: float = 1.0  # where the film begins
    frames_per_second: float = 20.0  # in the film and of the robot's time
    size: int = 240  # pixels, height and width
    seed: int = 10_000  # of the episode: the first that evaluation plays


def load(run: Path, args: Args) -> tuple[gym.Env, Actor]:
    """The run's robot, which draws itself, and its policy; ValueError if there is none."""
    if not (run / "args.json").is_file():
        raise ValueError(f"{run} is no run: it has no args.json")
    script = json.loads((run / "args.json").read_text())["script"]
    state = read.checkpoint(run, script)
    if "sac" not in state:
        raise ValueError(f"{run} has no policy that SAC has trained")
    gym.logger.min_level = gym.logger.ERROR
    view = {"camera_name": "track", "width": args.size, "height": args.size}
    env = gym.make(state["args"]["env"], render_mode="rgb_array", **view)
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    shapes = env.observation_space.shape[0], env.action_space.shape[0]
    averaged = AveragedModel(Actor(*shapes, tuple(state["args"]["hidden"])))
    averaged.load_state_dict(state["averaged"])
    return env, averaged.module


def film(env: gym.Env, actor: Actor, args: Args) -> list[np.ndarray]:
    """Pictures (height, width, 3), uint8, until the time is up or the episode ends."""
    frames, (obs, _), done = [], env.reset(seed=args.seed), False
    steps = 0
    while not done and steps * env.unwrapped.dt < args.first_second + args.seconds:
        while steps * env.unwrapped.dt >= args.first_second + len(frames) / args.frames_per_second:
            frames.append(env.render())
        obs, _, terminated, truncated, _ = env.step(actor.act(obs, 0.0))
        done, steps = terminated or truncated, steps + 1
    if not frames:
        end = f"{steps * env.unwrapped.dt:.2f} seconds"
        raise ValueError(f"the episode ends after {end}, before --first-second {args.first_second}")
    return frames


def write(frames: list[np.ndarray], path: Path, args: Args) -> None:
    """A GIF that repeats itself."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    palette = images[0].quantize(64)  # one for all: a smaller file, and no flicker
    first, *rest = [image.quantize(palette=palette, dither=0) for image in images]
    duration = round(1000 / args.frames_per_second)
    first.save(path, save_all=True, append_images=rest, duration=duration, loop=0)


if __name__ == "__main__":
    with read.input_errors():
        args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
        read.check_numbers(args, "seed first_second")
        if 100 % args.frames_per_second:
            raise ValueError("--frames-per-second must divide 100: a GIF counts in hundredths")
        path = args.output or args.run / "film.gif"
        frames = film(*load(args.run, args), args)
        write(frames, path, args)
        print(f"{path}: {len(frames)} pictures, {path.stat().st_size / 1000:.0f} kB")
