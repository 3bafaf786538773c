"""Small checkouts of our own with the shapes of the StyleGAN families; none of their code is here.

Each is a whole program: `train.py` trains a tiny generator against a tiny discriminator and writes
what the real ones write (`training_options.json`, `stats.jsonl`, a snapshot), in a second on a CPU.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from rlo_stylegan.repairs import SamplerArgument

COMMON = {
    "dnnlib/__init__.py": """
        import importlib

        class EasyDict(dict):
            def __getattr__(self, name):
                return self[name]
            def __setattr__(self, name, value):
                self[name] = value

        def construct(class_name, **options):
            module, _, name = class_name.rpartition('.')
            return getattr(importlib.import_module(module), name)(**options)
        """,
    "torch_utils/__init__.py": "",
    "torch_utils/training_stats.py": """
        seen = {}

        def report(name, value):
            seen.setdefault(name, []).extend(value.detach().double().flatten().tolist())
            return value

        def take():
            mean = {name: sum(v) / len(v) for name, v in seen.items()}
            taken = {n: {'num': len(v), 'mean': mean[n], 'std': 0.0} for n, v in seen.items()}
            seen.clear()
            return taken
        """,
    "torch_utils/misc.py": """
        import torch

        class EndlessSampler(torch.utils.data.Sampler):
            def __init__(self, dataset, seed=0):
                super().__init__(dataset)  # what torch took once
                self.dataset = dataset
        """,
    "training/__init__.py": "",
    "training/training_loop.py": """
        import json, os, pickle
        import torch
        import dnnlib
        from torch_utils import training_stats

        def training_loop(rank, run_dir, loss_kwargs, steps, num_gpus, random_seed, logit_scale):
            torch.manual_seed(random_seed + rank)
            G = torch.nn.Linear(4, 6)
            D = torch.nn.Linear(6, 1)
            loss = dnnlib.construct(device='cpu', G=G, D=D, scale=logit_scale, **loss_kwargs)
            opt = torch.optim.Adam([*G.parameters(), *D.parameters()], lr=0.01, betas=(0.0, 0.99))
            log = open(os.path.join(run_dir, 'stats.jsonl'), 'w') if rank == 0 else None
            for step in range(steps):
                real, z = torch.randn(8, 6) + 1, torch.randn(8, 4)
                for phase in ['G', 'D']:
                    net = G if phase == 'G' else D
                    other = D if phase == 'G' else G
                    net.requires_grad_(True)
                    other.requires_grad_(False)
                    opt.zero_grad(set_to_none=True)
                    loss.accumulate_gradients(phase, real, z)
                    if num_gpus > 1:
                        for p in net.parameters():
                            torch.distributed.all_reduce(p.grad)
                    opt.step()
                training_stats.report('Progress/kimg', torch.tensor([8.0 * (step + 1)]))
                if log:
                    log.write(json.dumps(training_stats.take()) + '\\n')
                    log.flush()
            if rank == 0:
                log.close()
                weights = [*G.named_parameters(), *D.named_parameters()]
                data = {f'{i} {n}': p.detach().tolist() for i, (n, p) in enumerate(weights)}
                with open(os.path.join(run_dir, 'network-snapshot-000008.pkl'), 'wb') as f:
                    pickle.dump({'weights': data, 'module': type(G).__module__}, f)
        """,
}

TERMS = """
    def accumulate_gradients(self, phase, real, z):
        # One network at a time.
        if phase == 'G':
            fake_logits = self.D(self.G(z)) * self.scale
            training_stats.report('Loss/scores/fake', fake_logits)
            g_loss = torch.nn.functional.softplus(-fake_logits) # fool D
            training_stats.report('Loss/G/loss', g_loss)
            g_loss.mean().backward()
        else:
            fake_logits = self.D(self.G(z)) * self.scale
            d_fake = torch.nn.functional.softplus(fake_logits)   # catch G

            real_logits = self.D(real) * self.scale
            training_stats.report('Loss/scores/real', real_logits)
            d_real = torch.nn.functional.softplus(-real_logits)
            training_stats.report('Loss/D/loss', d_fake + d_real)
            (d_fake + d_real).mean().backward()
"""

ONE_LINE = """    def __init__(self, device, G, D, scale=1, r1_gamma=10):
        super().__init__()
        self.G, self.D, self.scale = G, D, scale
        self.r1_gamma = r1_gamma
"""

WRAPPED = """    def __init__(self, device, G, D, scale=1,
                 r1_gamma=10,  # weight of the penalty
                 noise=None):
        super().__init__()
        self.G, self.D, self.scale = G, D, scale
        # the last comment of the constructor
"""

ONE_A_LINE = """    def __init__(
        self,
        device,            # where
        G,
        D,
        scale    = 1,      # of the logits
        r1_gamma = 10,     # weight of the penalty
    ):
        super().__init__()
        self.G, self.D, self.scale = G, D, scale
"""


def _loss(init: str) -> str:
    head = dedent(
        '''\
        # A loss of our own.

        """Docstring."""

        import torch
        from torch_utils import training_stats

        #-------------------------------------------------

        class Loss:
            def accumulate_gradients(self, phase, real, z): # for a subclass
                raise NotImplementedError()

        class TinyLoss(Loss):
        '''
    )
    tail = (
        "\n#-------------------------------------------------\n\ndef softplus(x):\n    return x\n"
    )
    return head + init + TERMS + tail


LAUNCH = """
        def subprocess_fn(rank, c, temp_dir):
            if c['num_gpus'] > 1:
                torch.distributed.init_process_group(
                    'gloo', init_method=f'file://{temp_dir}/init', rank=rank,
                    world_size=c['num_gpus'])
            training_loop.training_loop(rank=rank, **c)

        def run(c, outdir):
            c['run_dir'] = os.path.join(outdir, f'{len(os.listdir(outdir)):05d}-tiny')
            os.makedirs(c['run_dir'])
            with open(os.path.join(c['run_dir'], 'training_options.json'), 'wt') as f:
                json.dump(c, f, indent=2)
            with tempfile.TemporaryDirectory() as temp_dir:
                if c['num_gpus'] == 1:
                    subprocess_fn(rank=0, c=dict(c), temp_dir=temp_dir)
                else:
                    torch.multiprocessing.spawn(
                        fn=subprocess_fn, args=(dict(c), temp_dir), nprocs=c['num_gpus'])
"""

IMPORTS = """\
        import os
        import json
        import tempfile
        import torch
        import dnnlib
        from training import training_loop
"""

FORWARDED = f"""
        # Options by hand.

{IMPORTS}
        import click
{LAUNCH}
        def setup_training_loop_kwargs(
            # General.
            gpus  = None, # Number of processes
            steps = None, # Length

            # Loss.
            gamma = None, # Weight of the penalty
            scale = None, # Of the logits
        ):
            args = dnnlib.EasyDict()
            args.loss_kwargs = dnnlib.EasyDict(class_name='training.loss.TinyLoss', r1_gamma=10)
            if gamma is not None:
                args.loss_kwargs.r1_gamma = gamma
            args.steps, args.num_gpus, args.random_seed = steps or 5, gpus or 1, 0
            args.logit_scale = scale or 1.0
            return 'tiny', args

        @click.command()
        @click.pass_context

        # General.
        @click.option('--outdir', required=True)
        @click.option('--gpus', type=int)
        @click.option('--steps', type=int)

        # Loss.
        @click.option('--gamma', help='Weight of the penalty', type=float)
        @click.option('--scale', type=float)

        def main(ctx, outdir, **config_kwargs):
            '''Train.'''
            desc, args = setup_training_loop_kwargs(**config_kwargs)
            run(args, outdir)

        if __name__ == "__main__":
            main()
        """

COLLECTED = f"""
{IMPORTS}
        import click
{LAUNCH}
        def launch_training(c, desc, outdir):
            run(c, outdir)

        @click.command()

        # Required.
        @click.option('--outdir',  required=True)
        # Optional.
        @click.option('--gpus',    type=int, default=1)
        @click.option('--steps',   type=int, default=5)
        @click.option('--gamma',   type=float, default=10)
        @click.option('--scale',   type=float, default=1)

        def main(**kwargs):
            '''Train.'''
            opts = dnnlib.EasyDict(kwargs)
            c = dnnlib.EasyDict()
            c.loss_kwargs = dnnlib.EasyDict(class_name='training.loss.TinyLoss') # the loss
            c.loss_kwargs.r1_gamma = opts.gamma
            c.steps, c.num_gpus, c.random_seed = opts.steps, opts.gpus, 0
            c.logit_scale = opts.scale
            launch_training(c=c, desc='tiny', outdir=opts.outdir)

        if __name__ == "__main__":
            main()
        """

ARGPARSE = f"""
{IMPORTS}
        import argparse
{LAUNCH}
        def setup_training_loop_kwargs(
            gpus  = None,
            steps = None,
            gamma = None,
            scale = None,
            **kwargs,

        ):
            args = dnnlib.EasyDict()
            args.loss_kwargs = dnnlib.EasyDict(class_name='training.loss.TinyLoss', r1_gamma=10)
            args.steps, args.num_gpus, args.random_seed = steps or 5, gpus or 1, 0
            args.logit_scale = scale or 1.0
            return 'tiny', args

        def get_args_parser():
            parser = argparse.ArgumentParser('main')
            parser.add_argument('--outdir', required=True)
            parser.add_argument('--gpus', type=int)
            parser.add_argument('--steps', type=int)
            parser.add_argument('--scale', type=float)

            return parser

        def main(args):
            outdir = args.outdir
            desc, args = setup_training_loop_kwargs(**vars(args))
            run(args, outdir)

        if __name__ == "__main__":
            args = get_args_parser()
            main(args.parse_args())
        """

FAMILIES = {
    "ada": (_loss(ONE_LINE), FORWARDED),
    "stylegan3": (_loss(ONE_A_LINE), COLLECTED),
    "vision-aided": (_loss(WRAPPED), ARGPARSE),
}
BOM = b"\xef\xbb\xbf"

Build = Callable[..., Path]


def tree(root: Path) -> dict[str, tuple[str, int]]:
    """Every file below a root with the digest of its bytes and its mode."""
    return {
        path.relative_to(root).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mode,
        )
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def write(root: Path, files: dict[str, str], *, bom: bool = False, crlf: bool = False) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = dedent(text).lstrip("\n").encode()
        if crlf:
            content = content.replace(b"\n", b"\r\n")
        path.write_bytes(BOM + content if bom else content)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Make a checkout: `build("ada", bom=True, crlf=True, loss=..., script=...)`."""

    def make(
        family: str = "ada",
        *,
        folder: str = "checkout",
        bom: bool = False,
        crlf: bool = False,
        loss: str | None = None,
        script: str | None = None,
        more: dict[str, str] | None = None,
    ) -> Path:
        root = tmp_path / folder
        own_loss, own_script = FAMILIES[family]
        files = {"training/loss.py": loss or own_loss, "train.py": script or own_script}
        write(root, COMMON)
        write(root, files, bom=bom, crlf=crlf)
        write(root, more or {})
        return root

    return make


@pytest.fixture
def sampler_repair() -> Iterator[None]:
    """The repair of torch_utils/misc.py: torch 2.6 takes the argument still."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplerArgument, "needed", staticmethod(lambda: True))
        yield


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, tuple[str, int]]]:
    """The files of a folder: names, digests, modes."""
    return tree


@pytest.fixture
def fresh_modules() -> Iterator[None]:
    """Forget the modules of a checkout that was imported in this process."""
    names, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - names:
        if name.partition(".")[0] in ("train", "training", "dnnlib", "torch_utils"):
            del sys.modules[name]
    from rlo_stylegan.factory import patched_class

    patched_class.cache_clear()
