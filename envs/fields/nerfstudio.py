"""nerfstudio's models behind the interface of our fields: nerfacto, and splatfacto where there is CUDA.

Only its models and cameras are used, in memory: no parser of datasets, no files of images, no checkpoints that must be
unpickled. Scenes are fitted one after the other, as a model of nerfstudio is one scene.

What would go wrong with its defaults, and what is done:

- Its parsers turn, centre and rescale poses. Here poses are shifted to the scene's centre and divided by ``scale``, the
  same when fitting and drawing, so that its contraction begins where that of our own fields does.
- Its near plane is 0.05, and 0 once a model is in evaluation. Here it is ``near``, in metres, and stays.
- Its cameras are optimised along with the scene. Poses here are exact: that is off.
- An embedding of each picture lets its colours drift apart from those of views that have none: that is off, too.
- Masked pixels are never sampled; splatfacto, which draws whole pictures, gets them as masks.
- Its models anneal their samplers in callbacks, which its trainer calls. They are called here. The annealing is meant
  for tens of thousands of steps, and its state is not among a model's tensors: it ends after a fifth of the steps.
- tiny-cuda-nn makes its networks where it is installed; elsewhere, and on a CPU, PyTorch does.
- Every model loads a network for perceptual distances, which it would have to download. It is left out.

Source: Tancik et al., "Nerfstudio: A Modular Framework for Neural Radiance Field Development", SIGGRAPH 2023.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import time
import types
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fleetgym.core.errors import UserError, unknown
from fleetgym.core.optional import require
from fleetgym.core.run import track
from fleetgym.core.seeding import generator
from fleetgym.envs.fields.captures import Capture, Intrinsics
from fleetgym.envs.fields.fitting import Radiance, Steps, View, Work, synchronize

__all__ = ["METHODS", "Nerfstudios", "fit_nerfstudio"]

METHODS = {"nerfacto": 500, "splatfacto": 2000}
"""Models, and the steps that they take unless told otherwise."""
# Adam's step sizes at the beginning, as in nerfstudio's own methods, and the share that is left of them at the end, by
# the group of parameters.
_RATES = {
    "nerfacto": {"proposal_networks": (1e-2, 0.1), "fields": (1e-2, 0.1)},
    "splatfacto": {
        "means": (1.6e-4, 0.01),
        "features_dc": (2.5e-3, 1.0),
        "features_rest": (1.25e-4, 1.0),
        "opacities": (5e-2, 1.0),
        "scales": (5e-3, 1.0),
        "quats": (1e-3, 1.0),
    },
}
# Rays that are drawn at once.
_CHUNK = {"cpu": 1 << 11, "cuda": 1 << 15}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out warnings: nerfstudio 1.1.5 uses much that later versions of torch have renamed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _perceptual() -> Any:
    """The module of perceptual distances of torchmetrics.

    It imports torchvision where that is installed. torchvision's wheels have CUDA: beside a torch that has none its
    operators do not load, and its import fails at each that it refines. Their schemas alone let the import pass;
    nothing here calls them.
    """
    while True:
        try:
            return importlib.import_module("torchmetrics.image.lpip")
        except RuntimeError as error:
            absent = re.match(r"operator torchvision::(\w+) does not exist", str(error))
            if absent is None or absent[1] in _DECLARED:
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{absent[1]}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _DECLARED[absent[1]] = library
            for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "torchmetrics")]:
                del sys.modules[name]  # the halves of what failed


# Operators that were declared; they vanish with their library.
_DECLARED: dict[str, torch.library.Library] = {}


@contextlib.contextmanager
def _without_downloads() -> Iterator[None]:
    """While a model is built, its network for perceptual distances is an empty one."""
    lpip, name = _perceptual(), "LearnedPerceptualImagePatchSimilarity"
    real = getattr(lpip, name)
    setattr(lpip, name, lambda **options: torch.nn.Identity())
    try:
        yield
    finally:
        setattr(lpip, name, real)


def _config(method: str, near: float, far: float, iterations: int, device: str, options: Mapping[str, Any]) -> Any:
    """The configuration of a model; ``near`` and ``far`` in units of the scale."""
    with _quiet():
        from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig

        if method == "nerfacto":
            from nerfstudio.models.nerfacto import NerfactoModelConfig as Config

            fast = torch.device(device).type == "cuda" and importlib.util.find_spec("tinycudann") is not None
            settings = {
                "near_plane": near,
                "far_plane": far,
                "use_appearance_embedding": False,
                "average_init_density": 0.01,
                "proposal_weights_anneal_max_num_iters": min(1000, iterations // 5 + 1),
                "implementation": "tcnn" if fast else "torch",
                "eval_num_rays_per_chunk": _CHUNK.get(torch.device(device).type, 1 << 12),
            }
        else:
            from nerfstudio.models.splatfacto import SplatfactoModelConfig as Config

            # Pictures here are small: there is no coarser one to begin with. White is what is behind everything.
            settings = {"num_downscales": 0, "background_color": "white"}
    known = Config().__dict__
    for name in options:
        if name not in known or name == "camera_optimizer":
            raise unknown(f"option of {method}", name, sorted(set(known) - {"camera_optimizer"}))
    return Config(camera_optimizer=CameraOptimizerConfig(mode="off"), **{**settings, **options})


def _model(config: Any, views: int, device: str) -> torch.nn.Module:
    from nerfstudio.data.scene_box import SceneBox

    with _without_downloads():
        model = config.setup(
            scene_box=SceneBox(aabb=torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])),
            num_train_data=views,
            metadata={},
            device=device,
            grad_scaler=None,
            seed_points=None,
        )
    if model.collider is not None:
        model.collider.reset_near_plane = False
    if hasattr(model, "strategy"):
        model.strategy.verbose = False
    return model.to(device)


def _cameras(poses: np.ndarray, lens: Intrinsics, centre: np.ndarray, scale: float, device: str) -> Any:
    """Cameras of nerfstudio; its pixels' middles and its axes are ours."""
    from nerfstudio.cameras.cameras import Cameras, CameraType

    moved = np.array(poses[:, :3], np.float64)
    moved[:, :, 3] = (moved[:, :, 3] - centre) / scale
    return Cameras(
        camera_to_worlds=torch.as_tensor(moved, dtype=torch.float32),
        fx=lens.fx,
        fy=lens.fy,
        cx=lens.cx,
        cy=lens.cy,
        width=lens.width,
        height=lens.height,
        camera_type=CameraType.PERSPECTIVE,
    ).to(device)


def _train(model: Any, method: str, cameras: Any, capture: Capture, steps: Steps, device: str, progress: bool) -> None:
    """Fits one scene as nerfstudio's trainer does: callbacks before, loss, steps, callbacks after."""
    from nerfstudio.engine.callbacks import TrainingCallbackAttributes, TrainingCallbackLocation
    from nerfstudio.model_components.ray_generators import RayGenerator

    on_cuda = torch.device(device).type == "cuda"
    images = torch.as_tensor(capture.images, device=device).float() / 255
    masks = torch.as_tensor(capture.masks, device=device)
    usable = masks.nonzero()
    rates = _RATES[method]
    optimizers = {
        name: torch.optim.Adam(group, lr=rates[name][0], eps=1e-15)
        for name, group in model.get_param_groups().items()
        if len(group)
    }
    # Its networks are in 16 bits on CUDA, and their gradients would vanish unscaled; splats are not.
    mixed = on_cuda and method == "nerfacto"
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=mixed)
    callbacks = model.get_training_callbacks(
        TrainingCallbackAttributes(
            optimizers=types.SimpleNamespace(optimizers=optimizers), grad_scaler=scaler, pipeline=None, trainer=None
        )
    )
    lines = RayGenerator(cameras).to(device) if method == "nerfacto" else None
    model.train()
    for step in track(steps.iterations, "fitting with nerfstudio") if progress else range(steps.iterations):
        for callback in callbacks:
            callback.run_callback_at_location(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
        for name, optimizer in optimizers.items():
            first, left = rates[name]
            for group in optimizer.param_groups:
                group["lr"] = first * left ** (step / steps.iterations)
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(device).type, enabled=mixed):
            if lines is not None:
                at = usable[torch.randint(len(usable), (steps.batch,), device=device)]
                asked, batch = lines(at.cpu() if not on_cuda else at), {"image": images[tuple(at.T)], "indices": at}
            else:
                if step % len(images) == 0:
                    order = torch.randperm(len(images)).tolist()
                view = order[step % len(images)]
                asked, batch = cameras[view : view + 1], {"image": images[view], "mask": masks[view, ..., None]}
            outputs = model(asked)
            metrics = model.get_metrics_dict(outputs, batch)
            loss = sum(model.get_loss_dict(outputs, batch, metrics).values())
        scaler.scale(loss).backward()
        for optimizer in optimizers.values():
            scaler.step(optimizer)
        scaler.update()
        for callback in callbacks:
            callback.run_callback_at_location(step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
    if method == "nerfacto":
        model.proposal_sampler.set_anneal(1.0)  # as in a model that was read
    model.eval()


@dataclass(frozen=True, eq=False)
class Nerfstudios(Radiance):
    """N scenes fitted by nerfstudio; a kind of field (:class:`fleetgym.envs.fields.Fields`).

    Attributes:
        weights: The models' tensors, ``"{scene}.{name}"``: each scene's are its own, as splats differ in number.
        config: ``method``, ``scale``, ``near``, ``far`` and the ``model``'s options.
        centres: What space is contracted about, metres, [N, 3].
        intrinsics: The camera.
        report: How each scene's fit went.
        models: nerfstudio's models by scene, in evaluation.
    """

    models: dict[int, Any] = field(default_factory=dict, repr=False)

    SCHEMA = "fleetgym.nerfstudios/1"
    KEY = "nerfstudios"

    @classmethod
    def fit(cls, views: Any, **options: Any) -> Nerfstudios:
        """:func:`fit_nerfstudio`."""
        return fit_nerfstudio(views, **options)

    def _sound(self, n: int) -> bool:
        return all(bool(torch.isfinite(v).all()) for v in self.models[n].state_dict().values() if v.is_floating_point())

    def _clear(self, n: int) -> None:
        del self.models[n]
        for name in [name for name in self.weights if name.startswith(f"{n}.")]:
            del self.weights[name]

    def _paint(self, poses: np.ndarray, scenes: list[int], camera: Intrinsics) -> Tensor:
        scale = self.config["scale"]
        out = torch.empty(*poses.shape[:2], camera.height, camera.width, 5)
        for row, n in enumerate(scenes):
            model = self.models[n]
            cameras = _cameras(poses[row], camera, self.centres[n], scale, str(model.device))
            for m in range(len(poses[row])):
                with _quiet():
                    seen = model.get_outputs_for_camera(cameras[m : m + 1])
                met = seen["accumulation"]
                if "expected_depth" in seen:
                    distance = seen["expected_depth"]
                else:  # a splat's depth is along the axis, and not along the ray
                    ways = cameras.generate_rays(m, keep_shape=True).metadata["directions_norm"]
                    distance = seen["depth"] * ways
                out[row, m] = torch.cat([seen["rgb"], distance * scale * met, 1 - met], -1).float().cpu()
        return out

    def _trace(self, n: int, capture: Capture, chosen: np.ndarray) -> np.ndarray:
        model = self.models[n]
        if self.config["method"] == "splatfacto":
            return super()._trace(n, capture, chosen)
        from nerfstudio.model_components.ray_generators import RayGenerator

        cameras = _cameras(capture.poses, capture.intrinsics, self.centres[n], self.config["scale"], str(model.device))
        lines = RayGenerator(cameras).to(model.device)
        at = np.stack(np.unravel_index(chosen, capture.masks.shape), 1)
        with torch.no_grad(), _quiet():
            parts = torch.as_tensor(at, device=model.device).split(model.config.eval_num_rays_per_chunk)
            return torch.cat([model(lines(part))["rgb"] for part in parts]).float().cpu().numpy()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the fields into a folder, which appears complete or not at all: safetensors and JSON, no pickle."""
        self.write(folder, self.weights, self.config)

    @classmethod
    def load(cls, folder: str | os.PathLike, device: str = "cpu") -> Nerfstudios:
        """Reads what :meth:`save` wrote.

        Raises:
            UserError: The folder is missing, what it holds are not such fields, nerfstudio is not installed, or the
                device is not fit for them.
        """
        document, tensors = cls.read(folder)
        config, report, centres = document["config"], document["report"], tensors.pop("centres").double().numpy()
        _check_device(config["method"], device)
        require("nerfstudio")
        models = {}
        for one in report:
            if one.failed:
                continue
            mine = {name.partition(".")[2]: v for name, v in tensors.items() if name.startswith(f"{one.scene}.")}
            near, far = config["near"] / config["scale"], config["far"] / config["scale"]
            try:
                models[one.scene] = _model(
                    _config(config["method"], near, far, one.iterations, device, config["model"]), one.views, device
                ).eval()
                models[one.scene].load_state_dict(mine)
            except RuntimeError as error:
                raise UserError(
                    f"{folder}: scene {one.scene} does not fit the model on {device!r}: {str(error).splitlines()[0]}; "
                    "load it where it was fitted, or save it anew"
                ) from error
        return cls(_flat(models), config, centres, document["intrinsics"], report, models)


def _flat(models: Mapping[int, Any]) -> dict[str, Tensor]:
    return {f"{n}.{name}": value for n, model in models.items() for name, value in model.state_dict().items()}


def _check_device(method: str, device: str) -> None:
    if method not in METHODS:
        raise unknown("method of nerfstudio", method, METHODS)
    on_cuda = torch.device(device).type == "cuda"
    if method == "splatfacto" and not on_cuda:
        raise UserError(
            f"method='splatfacto' on {device!r}: its splats are drawn by gsplat, which needs CUDA; give device='cuda', "
            "or method='nerfacto', which also works on a CPU"
        )
    if on_cuda and not torch.cuda.is_available():
        raise UserError(f"device={device!r}: torch finds no CUDA device; give device='cpu'")


def fit_nerfstudio(
    captures: Any,
    *,
    method: str = "nerfacto",
    centre: Any = None,
    scale: float = 0.2,
    iterations: int | None = None,
    seed: int = 0,
    batch: int = 1024,
    near: float = 0.02,
    far: float = 3.0,
    model: Mapping[str, Any] | None = None,
    hold_out: int = 0,
    on_error: str = "raise",
    device: str = "cpu",
    progress: bool = False,
) -> Nerfstudios:
    """Fits one of nerfstudio's models to each of N captures, one after the other.

    Args:
        captures: A list of :class:`fleetgym.envs.fields.captures.Capture`, or one; all by the same camera.
        method: A name in :data:`METHODS`; ``splatfacto`` needs CUDA.
        centre: Where detail is wanted; metres, [3] or [N, 3]. None: where the cameras look at
            (:func:`fleetgym.envs.fields.fitting.middle`).
        scale: Half the side of the cube about the centre that is not contracted, metres.
        iterations: Steps; None for those of :data:`METHODS`.
        seed: Of the first weights, the order of rays and the places of samples.
        batch: Rays a step, for ``nerfacto``; a step of ``splatfacto`` is a picture.
        near: Where rays begin, metres from the camera, for ``nerfacto``.
        far: Where they end.
        model: Options of nerfstudio's model, such as ``{"num_levels": 8, "log2_hashmap_size": 15}`` for one that a CPU
            can fit; the camera's optimiser stays off.
        hold_out: How many views of each capture, evenly spread, to keep from the fit and judge it by.
        on_error: ``"raise"``, or ``"skip"``: a capture that is unusable is reported, and the others are fitted.
        device: Where to fit.
        progress: Whether to show a progress bar for each scene.

    Returns:
        The fields, with a report for each scene.

    Raises:
        UserError: nerfstudio is not installed (the message has the lines that install it), an unknown method or option,
            a device that is not there or not fit for the method; an unusable capture (unless skipped) or none at all.
    """
    _check_device(method, device)
    steps = Steps(METHODS[method] if iterations is None else iterations, batch, 1.0, seed)
    View.checked(scale, near, far, (2, 2), False, (1, 1, 1))
    options = dict(model or {})
    work = Work.of(captures, centre, hold_out, on_error)
    require("nerfstudio")
    config = _config(method, near / scale, far / scale, steps.iterations, device, options)
    on_cuda = torch.device(device).type == "cuda"
    clock = time.perf_counter if on_cuda else time.process_time
    models, seconds = {}, {}
    for n, capture in work.fit.items():
        began = clock()
        with torch.random.fork_rng(), _quiet():
            # nerfstudio draws from torch's own generator; a scene draws what it would draw alone.
            torch.manual_seed(int(generator("nerfstudio", seed).integers(2**62)))
            models[n] = _model(config, len(capture.images), device)
            cameras = _cameras(capture.poses, capture.intrinsics, work.centres[n], scale, device)
            _train(models[n], method, cameras, capture, steps, device, progress)
        synchronize(device)
        seconds[n] = clock() - began
    kept = {"method": method, "scale": scale, "near": near, "far": far, "model": options}
    fields = Nerfstudios(_flat(models), kept, work.centres, work.camera, [], models)
    fields.conclude(work, steps.iterations, seconds, seed, on_error, "take fewer iterations, or another seed")
    return fields
