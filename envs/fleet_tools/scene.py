"""A scene: the arm (or its hand alone) with a tool, before a table with something to do on it."""

from __future__ import annotations

import functools
from typing import Any

from fleetgym.core.render import choose_gl
from fleetgym.envs.fleet_tools.instances import Instance, tool_shapes
from fleetgym.envs.fleet_tools.mechanisms import MECHANISMS, USE
from fleetgym.envs.fleet_tools.panda import DOWN as DOWN
from fleetgym.envs.fleet_tools.panda import TCP, actuators_xml, arm_xml

choose_gl()  # before MuJoCo is imported

import mujoco  # noqa: E402
import numpy as np  # noqa: E402

#: Where the arm begins, between its finger tips, metres.
START = np.array([0.42, 0.0, 0.3])
#: Of MuJoCo, seconds.
TIMESTEP = 0.004
#: The hand alone stands on three slides and a ball joint between its finger tips, with a servo for each of the six
#: directions: stiffness, N/m and N m/rad, damping, N s/m and N m s/rad, and largest force and torque, N and N m. The
#: joints' own inertia, kg and kg m^2, stands for that of an arm.
HAND_SLIDE = (12000.0, 320.0, 150.0, 1.0)
HAND_TURN = (250.0, 7.0, 40.0, 0.02)
#: Class of objects -> its bodies, and the distance, metres, that other shapes keep from them. A tool may come at
#: 0.6 m/s, that is 2.4 mm a time step: without it, shapes would overlap by as much before they are pushed apart, and
#: where that is more than a pin's rim is wide, the nearest way out would lead sideways, with forces that nothing in the
#: world has. The blocks and the hand have none: MuJoCo's contacts of two boxes are not always right with one.
MARGIN = {"pin": {"pin": 0.002}, "pieces": {"object": 0.001, "other": 0.001}}

# Elliptic cones: friction is the same in all directions, a contact takes fewer numbers than with pyramidal ones, and a
# jaw that goes over a nut is pressed by a third of the forces.
_HEADER = """
<option timestep="{timestep}" integrator="implicitfast" cone="elliptic" iterations="20"
  ls_iterations="50" tolerance="1e-8">
  <flag eulerdamp="disable"/>
</option>
<compiler angle="radian" autolimits="true" boundmass="1e-4" boundinertia="1e-7"/>
<size memory="2M"/>
<visual><headlight ambient="0.45 0.45 0.45" diffuse="0.5 0.5 0.5" specular="0.1 0.1 0.1"/>
  <map znear="0.005" zfar="10"/><global offwidth="640" offheight="480"/></visual>
<default>
  <geom solref="0.008 1" solimp="0.95 0.99 0.001" density="500" contype="1" conaffinity="1" condim="3"/>
  <default class="arm"><geom contype="2" conaffinity="0" mass="0" rgba="0.93 0.93 0.95 1" group="1"/></default>
  <default class="hand"><geom contype="2" conaffinity="0" mass="0" rgba="0.25 0.26 0.29 1" group="1"/></default>
  <default class="picture"><geom contype="0" conaffinity="0" mass="0"/></default>
</default>
<asset>
  <texture name="wood" type="2d" builtin="checker" rgb1="0.58 0.47 0.36" rgb2="0.55 0.44 0.33" width="128"
    height="128"/>
  <material name="wood" texture="wood" texrepeat="6 6" texuniform="true" specular="0.1" reflectance="0"/>
  <texture type="skybox" builtin="gradient" rgb1="0.85 0.9 0.95" rgb2="0.5 0.55 0.65" width="16" height="96"/>
</asset>
"""


def _hand_xml(shapes: str, arm: str) -> str:
    """What is inside the hand's body: palm, fingers, camera and the tool."""
    inertia = '<inertial mass="0.76" pos="-0.01 0 0.032" diaginertia="0.001 0.0026 0.0018"/>'
    if arm == "hand":
        inertia = '<inertial mass="0.76" pos="0 0 0.06" diaginertia="0.005 0.005 0.003"/>'
    return (
        f'{inertia}<geom class="hand" type="box" size="0.02 0.1 0.03" pos="0 0 0.033"/>'
        '<geom name="left" class="hand" type="box" size="0.01 0.008 0.025" pos="0 0.02 0.0875"/>'
        '<geom name="right" class="hand" type="box" size="0.01 0.008 0.025" pos="0 -0.02 0.0875"/>'
        '<camera name="wrist" pos="0.075 0 0.02" xyaxes="0 1 0 1 0 -0.45" fovy="75"/>'
        f'<body name="tool" pos="0 0 {TCP}" quat="0 1 0 0" gravcomp="1">{shapes}</body>'
    )


def _alone_xml(inside: str) -> tuple[str, str]:
    """MJCF of the hand without an arm, and of its servos.

    With all slides at zero, the point between the finger tips is at the world's origin; the axes are the world's.
    """
    joints, servos = "", ""
    for axis, turned in zip(("1 0 0", "0 -1 0", "0 0 -1"), "xyz"):
        joints += f'<joint name="hand_{turned}" type="slide" axis="{axis}" armature="{HAND_SLIDE[3]}"/>'
    joints += f'<joint name="hand_turn" type="ball" pos="0 0 {TCP}" armature="{HAND_TURN[3]}"/>'
    for number, (kp, kv, force, _) in enumerate((*[HAND_SLIDE] * 3, *[HAND_TURN] * 3)):
        name, gear = f"hand_{'xyz'[number % 3]}", "1"
        if number >= 3:
            name, gear = "hand_turn", " ".join(str(int(index == number - 3)) for index in range(3))
        servos += (
            f'<position joint="{name}" gear="{gear}" kp="{kp}" kv="{kv}" forcerange="{-force} {force}" '
            'ctrllimited="false"/>'
        )
    body = f'<body name="hand" pos="0 0 {TCP}" quat="0 1 0 0" gravcomp="1">{joints}{inside}</body>'
    return body, f"<actuator>{servos}</actuator>"


def scene_xml(
    task: str, tool: Instance, made: Instance, arm: str, timestep: float = TIMESTEP, sensors: bool = False
) -> str:
    """MJCF of a scene.

    Args:
        task: A task name; tells which mechanism stands on the table.
        tool: The tool in the hand.
        made: The object.
        arm: ``"panda"`` or ``"hand"``.
        timestep: Seconds.
        sensors: Whether force and torque between hand and tool are measured.
    """
    shapes, keypoints = tool_shapes(tool, USE[made.kind])
    shapes += '<site name="grip" size="0.001" rgba="0 0 0 0"/>'
    for name, place in keypoints.items():
        shapes += (
            f'<site name="{name}" pos="{place[0]:.6g} {place[1]:.6g} {place[2]:.6g}" size="0.002" rgba="0 0 0 0"/>'
        )
    inside = _hand_xml(shapes, arm)
    mechanism = MECHANISMS[made.kind]
    if arm == "panda":
        robot, drive = arm_xml(inside), f"<actuator>{actuators_xml()}</actuator>"
    else:
        robot, drive = _alone_xml(inside)
    sensor = '<sensor><force site="grip"/><torque site="grip"/></sensor>' if sensors else ""
    return (
        f'<mujoco model="{task}">{_HEADER.format(timestep=timestep)}<worldbody>'
        '<light pos="0.3 0 2" dir="0 0 -1" diffuse="0.5 0.5 0.5"/>'
        '<camera name="overhead" pos="0.5 0 0.95" xyaxes="0 -1 0 1 0 0" fovy="45"/>'
        '<camera name="front" pos="1.25 -0.55 0.6" xyaxes="0.55 0.83 0 -0.36 0.24 0.9" fovy="45"/>'
        '<geom name="table" type="plane" size="0 0 0.1" pos="0.4 0 0" material="wood" contype="1" conaffinity="3"'
        f' friction="0.8 0.005 0.0001"/>{robot}{mechanism.xml(made)}</worldbody>'
        f"{drive}{mechanism.more_xml(made)}{sensor}<contact>{mechanism.contact_xml()}</contact></mujoco>"
    )


@functools.lru_cache(maxsize=256)
def _compiled(task: str, tool: Instance, made: Instance, arm: str, timestep: float, sensors: bool) -> Any:
    model = mujoco.MjModel.from_xml_string(scene_xml(task, tool, made, arm, timestep, sensors))
    for name, margin in MARGIN.get(made.kind, {}).items():
        body = model.body(name).id
        model.geom_margin[model.geom_bodyid == body] = model.body_margin[body] = margin
    return model


def compiled(
    task: str, tool: Instance, made: Instance, arm: str, timestep: float = TIMESTEP, sensors: bool = False
) -> Any:
    """The ``mujoco.MjModel`` of a scene, made once in a process; copy it before changing it."""
    return _compiled(task, tool, made, arm, timestep, sensors)
