"""A small training script with the shapes that timm's train.py has had, on real timm parts.

Ours, not timm's: it keeps the names and the order by which the slot is found (`config_parser`,
`parser`, `_parse_args`, `main`, `train_loss_fn`, `validate_loss_fn`, `task`, the two loops), trains
a small timm model on fixed random images, and writes what each step saw to `seen.pt`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from rlo_core.launch import run_script
from rlo_timm.launcher.train_script import transform

HEADER = '''
"""A training script."""
import argparse
import os
from pathlib import Path

import torch
import torch.nn as nn
import yaml
from timm import create_model, utils
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy
from timm.loss import SoftTargetCrossEntropy
try:
    from timm.loss import create_classification_loss
    from timm.task import ClassificationTask, LogitDistillationTask
    from timm.task import MultiLabelClassificationTask
except ImportError:
    pass

config_parser = parser = argparse.ArgumentParser(description='Config', add_help=False)
parser.add_argument('-c', '--config', default='', type=str)
parser = argparse.ArgumentParser(description='Training')
parser.add_argument('--model', default='test_vit')
parser.add_argument('--classes', default=5, type=int)
parser.add_argument('--resume', default='')
parser.add_argument('--start-epoch', default=None, type=int)
parser.add_argument('--epochs', default=1, type=int)
parser.add_argument('--lr', default=0.05, type=float)
parser.add_argument('--log-interval', default=50, type=int)
parser.add_argument('--smoothing', default=0.1, type=float)
parser.add_argument('--mixup', default=0.0, type=float)
parser.add_argument('--cutmix', default=0.0, type=float)
parser.add_argument('--cutmix-minmax', default=None, type=float, nargs='+')
parser.add_argument('--aug-splits', default=0, type=int)
parser.add_argument('--jsd-loss', action='store_true')
parser.add_argument('--bce-loss', action='store_true')
parser.add_argument('--bce-sum', action='store_true')
parser.add_argument('--bce-target-thresh', default=None, type=float)
parser.add_argument('--bce-pos-weight', default=None, type=float)
parser.add_argument('--kd-model-name', default=None)
parser.add_argument('--task-loss-weight', default=None, type=float)
parser.add_argument('--distill-loss-weight', default=None, type=float)
parser.add_argument('--torchcompile', default=None)
parser.add_argument('--workers', default=0, type=int)
parser.add_argument('--amp', action='store_true')
parser.add_argument('--device-modules', default=None, nargs='+')
parser.add_argument('--output', default='.')
@OPTIONS@

def _parse_args():
    args_config, remaining = config_parser.parse_known_args()
    if args_config.config:
        with open(args_config.config, 'r') as f:
            values = yaml.safe_load(f)
@VALIDATE_YAML@
            parser.set_defaults(**values)
    args = parser.parse_args(remaining)
@CHECKS@
    args_text = yaml.safe_dump(args.__dict__, default_flow_style=False)
    return args, args_text


class Images(torch.utils.data.Dataset):
    def __init__(self, classes, dense=False):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(8, 3, 32, 32, generator=generator)
        self.y = torch.randint(classes, (8,), generator=generator)
        if dense:
            self.y = torch.randint(2, (8, classes), generator=generator).float()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def main():
    utils.setup_default_logging()
    args, args_text = _parse_args()
    if args.device_modules:
        import importlib
        for module in args.device_modules:
            importlib.import_module(module)
    device = torch.device('cpu')
    args.rank = int(os.environ.get('RANK', 0))
    args.world_size = int(os.environ.get('WORLD_SIZE', 1))
    distributed = args.world_size > 1
    if distributed:
        torch.distributed.init_process_group('gloo')
    torch.manual_seed(42)
    size = {} if 'resnet' in args.model else dict(img_size=32)
    model = create_model(args.model, num_classes=args.classes, **size)
    mixup_active = args.mixup > 0 or args.cutmix > 0. or args.cutmix_minmax is not None
    mixup_fn = None
    if mixup_active:
        mixup_fn = Mixup(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix,
                         label_smoothing=args.smoothing, num_classes=args.classes)
    data = Images(args.classes, dense=getattr(args, 'task', None) == 'multilabel')
    if distributed:
        data = torch.utils.data.Subset(data, range(args.rank, 8, args.world_size))
    context = 'spawn' if args.workers else None
    loader_train = torch.utils.data.DataLoader(
        data, batch_size=4 // args.world_size, num_workers=args.workers,
        multiprocessing_context=context)
@LOSS@
    start_epoch = 0
    if args.resume == 'auto':
        args.resume = str(Path(args.output) / 'last.pth.tar')
        args.resume = args.resume if os.path.exists(args.resume) else ''
    if args.resume:
        state = torch.load(args.resume, weights_only=True)
        model.load_state_dict(state['state_dict'])
        start_epoch = state['epoch'] + 1
    if args.start_epoch is not None:
        start_epoch = args.start_epoch
    num_epochs = args.epochs
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    seen = []
    for epoch in range(start_epoch, num_epochs):
        train_one_epoch(epoch, model, loader_train, optimizer, @STEP@, args, mixup_fn, seen)
        validation = validate(model, loader_train, @VALIDATE@)
    output = Path(args.output)
    if args.rank == 0:
        (output / 'args.yaml').write_text(args_text)
        weights = getattr(model, 'module', model).state_dict()
        state = {'state_dict': weights, 'epoch': num_epochs - 1}
        torch.save(state, output / 'last.pth.tar')
        torch.save({'steps': seen, 'validation': validation}, output / 'seen.pt')
    if distributed:
        torch.distributed.destroy_process_group()


def train_one_epoch(epoch, model, loader, optimizer, step, args, mixup_fn, seen):
    model.train()
    for batch_idx, (input, target) in enumerate(loader):
        if mixup_fn is not None:
            input, target = mixup_fn(input, target)
        if args.aug_splits:
            noise = torch.Generator().manual_seed(batch_idx)
            input = torch.cat([input + 0.1 * i * torch.randn(input.shape, generator=noise)
                               for i in range(args.aug_splits)])
            target = target.repeat(args.aug_splits)
        with torch.autocast('cpu', torch.bfloat16, enabled=args.amp):
            output, loss = step(input, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append({'output': output.detach(), 'target': target, 'loss': loss.detach()})


@torch.no_grad()
def validate(model, loader, loss_fn):
    model.eval()
    rows = [(model(input), target) for input, target in loader]
    output, target = (torch.cat(column) for column in zip(*rows))
    return {'output': output, 'target': target, 'loss': loss_fn(output, target)}


if __name__ == '__main__':
    main()
'''

# v0.2.1 to v0.4.12: each branch moves its own loss, no binary loss.
EARLY = """
    if args.jsd_loss:
        train_loss_fn = JsdCrossEntropy(args.aug_splits, smoothing=args.smoothing).to(device)
    elif mixup_active:
        train_loss_fn = SoftTargetCrossEntropy().to(device)
    elif args.smoothing:
        train_loss_fn = LabelSmoothingCrossEntropy(smoothing=args.smoothing).to(device)
    else:
        train_loss_fn = nn.CrossEntropyLoss().to(device)
    validate_loss_fn = nn.CrossEntropyLoss().to(device)
"""
# v0.5.4 to v1.0.22: binary losses too, moved afterwards.
BINARY = """
    if args.jsd_loss:
        train_loss_fn = JsdCrossEntropy(num_splits=args.aug_splits, smoothing=args.smoothing)
    elif mixup_active:
        if args.bce_loss:
            train_loss_fn = BinaryCrossEntropy(
                smoothing=0., target_threshold=args.bce_target_thresh, sum_classes=args.bce_sum,
                pos_weight=args.bce_pos_weight)
        else:
            train_loss_fn = SoftTargetCrossEntropy()
    elif args.smoothing:
        if args.bce_loss:
            train_loss_fn = BinaryCrossEntropy(
                smoothing=args.smoothing, target_threshold=args.bce_target_thresh,
                sum_classes=args.bce_sum, pos_weight=args.bce_pos_weight)
        else:
            train_loss_fn = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    else:
        train_loss_fn = nn.CrossEntropyLoss()
    train_loss_fn = train_loss_fn.to(device=device)
    validate_loss_fn = nn.CrossEntropyLoss().to(device=device)
"""
DIRECT = """
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile)
    if distributed:
        model = nn.parallel.DistributedDataParallel(model)

    def step(input, target):
        output = model(input)
        return output, train_loss_fn(output, target)
"""
# v1.0.23 to v1.0.29: the loss is handed to a task.
TASK = """
    if args.kd_model_name is not None:
        teacher = create_model(args.kd_model_name, num_classes=args.classes, img_size=32)
        task = LogitDistillationTask(
            student_model=model, teacher_model=teacher, @CRITERION@,
            distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight,
            device=device, verbose=False)
    else:
        task = ClassificationTask(model=model, @CRITERION@, device=device, verbose=False)
    if args.torchcompile:
        @COMPILE@
    if distributed:
        task.prepare_distributed(device_ids=None)
    model = task.trainable_module

    def step(input, target):
        result = task(input, target)
        return result['output'], result['loss']
"""
# v1.0.30 on: a `--loss` of its own, and the task makes its criterion.
OWN_OPTIONS = """
parser.add_argument('--loss', default=None, choices=('ce', 'bce', 'asl', 'poly', 'jsd'))
parser.add_argument('--loss-pos-weight', default=None)
parser.add_argument('--task', default='classification', choices=('classification', 'multilabel'))
parser.add_argument('--class-weight', default=None, type=float, nargs='+')
"""
# YAML values are held against the script's own options: names, choices, types.
OWN_YAML = """
            known = {action.dest: action for action in parser._actions}
            for key, value in values.items():
                if key not in known:
                    parser.error(f'unknown argument {key!r} in {args_config.config}')
                action = known[key]
                if action.choices is not None and value is not None:
                    if value not in action.choices:
                        parser.error(f'{key}: invalid choice {value!r}')
                if action.type is not None and value is not None:
                    items = value if isinstance(value, list) else [value]
                    for item in items:
                        action.type(item)
"""
OWN_CHECKS = """
    if args.bce_loss and args.loss not in (None, 'bce'):
        parser.error('--bce-loss conflicts with --loss')
    if args.bce_loss:
        args.loss = 'bce'
    if args.jsd_loss:
        args.loss = 'jsd'
    if args.loss not in (None, 'ce', 'bce', 'asl', 'poly', 'jsd'):
        parser.error(f'unknown loss {args.loss}')
"""
OWN_LOSS = """
    criterion_kwargs = dict(
        loss_type=args.loss, smoothing=args.smoothing, soft_targets=mixup_active,
        bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum,
        pos_weight=args.bce_pos_weight, jsd_splits=args.aug_splits,
        class_weight=args.class_weight)
    Task = MultiLabelClassificationTask if args.task == 'multilabel' else ClassificationTask
"""


def _shape(
    loss: str,
    *,
    criterion: str = "criterion=train_loss_fn",
    compile_: str = "task.compile(backend=args.torchcompile)",
    options: str = "",
    checks: str = "",
    yaml: str = "",
    task: bool = True,
    validate: str = "validate_loss_fn",
) -> str:
    after = TASK.replace("@CRITERION@", criterion).replace("@COMPILE@", compile_)
    source = HEADER.lstrip("\n").replace("@LOSS@", loss + (after if task else DIRECT))
    source = source.replace("@OPTIONS@", options).replace("@CHECKS@", checks)
    source = source.replace("@VALIDATE_YAML@", yaml)
    return source.replace("@STEP@", "step").replace("@VALIDATE@", validate)


SHAPES = {
    "v0.2": _shape(EARLY, task=False),
    "v0.5": _shape(BINARY, task=False),
    "v1.0.23": _shape(
        BINARY, compile_="task = torch.compile(task, backend=args.torchcompile)"
    ).replace(
        "model = task.trainable_module", "model = getattr(task, '_orig_mod', task).trainable_module"
    ),
    "v1.0.28": _shape(BINARY),
    "v1.0.31": _shape(
        OWN_LOSS,
        criterion="criterion_kwargs=criterion_kwargs",
        options=OWN_OPTIONS,
        checks=OWN_CHECKS,
        yaml=OWN_YAML,
        validate="nn.CrossEntropyLoss()",
    ).replace("task = ClassificationTask(", "task = Task("),
}
SINCE = {"v1.0.23": "1.0.23", "v1.0.28": "1.0.23", "v1.0.31": "1.0.30"}
"""The timm that brought what a shape calls: `timm.task`, and the criteria that its tasks make."""


def runs(shape: str) -> bool:
    """Tell whether the installed timm has what the shape calls."""
    return Version(timm.__version__) >= Version(SINCE.get(shape, "0"))


USUAL = "v1.0.28" if runs("v1.0.28") else "v0.5"


@pytest.fixture(params=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> str:
    """Each shape that train.py has had."""
    return str(request.param)


@pytest.fixture
def write_script(tmp_path: Path) -> Callable[[str], Path]:
    """Write the script of a shape as `train.py`."""

    def write(shape: str = USUAL) -> Path:
        path = tmp_path / "train.py"
        path.write_text(SHAPES[shape], encoding="utf-8")
        return path

    return write


@pytest.fixture
def train(
    write_script: Callable[[str], Path], tmp_path: Path
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Run the script of a shape in this process, launched or plain, and return what it saw."""
    handlers, level = logging.root.handlers[:], logging.root.level

    def run(*argv: str, shape: str = USUAL, launched: bool = True) -> dict[str, Any]:
        if not runs(shape):
            pytest.skip(f"train.py of {shape} needs what timm has since {SINCE[shape]}")
        path = write_script(shape)
        arguments: Sequence[str] = ["--output", str(tmp_path), *argv]
        torch.manual_seed(1)
        run_script(path, arguments, transform=transform if launched else None)
        seen: dict[str, Any] = torch.load(tmp_path / "seen.pt", weights_only=True)
        seen["args"] = (tmp_path / "args.yaml").read_text()
        seen["weights"] = torch.load(tmp_path / "last.pth.tar", weights_only=True)["state_dict"]
        return seen

    yield run
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
