"""What role cuda says of a host's GPUs, to the letter, and which of them it gives to a service."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from plugins import load

from playbooks import ROOT, ansible_playbook

CUDA = load("roles/cuda/filter_plugins/cuda.py")
FACTS = load("roles/cuda/library/cuda_facts.py")
PLACE = load("molecule/resources/fake_gpu/place.py").place
WANTED = {
    "host": "node1", "profile": "cuda12", "driver_floor": 530, "profiles": {"cuda12": 530, "cuda13": 580, "cpu": 0}, "cuda_floor": "12.1",
    "gpu_count": 0, "require_ecc": True, "install": False, "branch": 580,
}  # fmt: skip
CUDA13 = {"profile": "cuda13", "driver_floor": 580}


def see(folder: Path, fixture: str, **changes: Any) -> dict[str, Any]:
    program = PLACE(folder, fixture, changes)
    result: dict[str, Any] = FACTS.facts(str(program), str(folder / "sys"))
    return result


def problems(seen: dict[str, Any], **wanted: Any) -> list[str]:
    result: list[str] = CUDA.cuda_problems(seen, {**WANTED, **wanted})
    return result


CASES: list[tuple[str, dict[str, Any], dict[str, Any], list[str]]] = [
    ("2x80-nvlink", {}, {}, []),
    ("2x80-pcie", {}, {}, []),
    ("4x80-pairs", {}, {"gpu_count": 4}, []),
    ("1x24-geforce", {}, {"require_ecc": False}, []),
    # drivers against profiles
    (
        "1x80",
        {"driver": "525.147.05"},
        {},
        [
            "node1: the driver is 525.147.05, and profile cuda12 needs branch 530 or newer; "
            "set cuda_driver_branch to 580 and cuda_install to true."
        ],
    ),
    ("1x80", {"driver": "530.30.02"}, {}, []),
    ("1x80", {"driver": "570.124.06"}, {}, []),
    ("1x80", {"driver": "580.65.06"}, {}, []),
    ("1x80", {"driver": "580.65.06"}, CUDA13, []),
    *[
        (
            "1x80",
            {"driver": driver},
            CUDA13,
            [
                f"node1: the driver is {driver}, and profile cuda13 needs branch 580 or newer; "
                "set qwen_service_profile to cuda12, or cuda_driver_branch to 580 and cuda_install to true."
            ],
        )
        for driver in ("530.30.02", "535.183.06", "570.124.06")
    ],
    (
        "1x80",
        {"driver": "525.147.05"},
        {**CUDA13, "branch": 535},
        [
            "node1: the driver is 525.147.05, and profile cuda13 needs branch 580 or newer; "
            "set cuda_driver_branch to 580 and cuda_install to true."
        ],
    ),
    ("1x80", {"driver": "525.147.05"}, {"install": True}, []),
    (
        "1x80",
        {"driver": "525.147.05"},
        {"install": True, "branch": 525},
        ["node1: cuda_driver_branch is 525, and profile cuda12 needs 530 or newer; set cuda_driver_branch to 580."],
    ),
    (
        "1x80",
        {},
        {**CUDA13, "install": True, "branch": 570},
        [
            "node1: cuda_driver_branch is 570, and profile cuda13 needs 580 or newer; "
            "set qwen_service_profile to cuda12, or cuda_driver_branch to 580."
        ],
    ),
    (
        "1x80",
        {"cuda": "12.0"},
        {},
        ["node1: the driver's CUDA is 12.0, and at least 12.1 is needed; set cuda_driver_branch to 580 and cuda_install to true."],
    ),
    (
        "1x80",
        {"cuda": "N/A"},
        {},
        ["node1: the driver names no CUDA version, so its library libcuda is missing; set cuda_install to true, or install it."],
    ),
    # nobody answers
    (
        "no-driver",
        {},
        {},
        [
            "node1: cuda_install is false, and nvidia-smi does not reach the NVIDIA driver; set cuda_install to true, "
            "or install a driver of branch 530 or newer, which profile cuda12 needs."
        ],
    ),
    ("no-driver", {}, {"install": True}, []),
    (
        "mismatch",
        {},
        {},
        [
            "node1: cuda_install is false, and the NVIDIA module that is loaded is of another version than the libraries that are "
            "installed; reboot the host, or set cuda_install and cuda_reboot_allowed to true."
        ],
    ),
    (
        "no-devices",
        {},
        {},
        ["node1: the PCI bus shows 2 of NVIDIA's GPUs, and nvidia-smi finds no GPU; reboot the host or mend it (dmesg names the reason)."],
    ),
    (
        "no-driver",
        {"on_bus": 0},
        {"install": True},
        [
            "node1: cuda_profile is 'cuda12', which needs a GPU, and the PCI bus shows none of NVIDIA's; "
            "set qwen_gpu_tier to a tier of a profile that needs none (cpu)."
        ],
    ),
    # GPUs that cannot be used as they are
    (
        "2x80-lost",
        {},
        {"gpu_count": 2},
        ["node1: the driver has lost GPU 0000:3B:00.0; reboot the host or mend it (dmesg names the Xid)."],
    ),
    (
        "2x80-missing",
        {},
        {"gpu_count": 2},
        ["node1: the PCI bus shows 2 of NVIDIA's GPUs, and 1 GPU answers; reboot the host or mend it (dmesg names the reason)."],
    ),
    (
        "2x80-nvlink",
        {},
        {"gpu_count": 4},
        ["node1: cuda_gpu_count is 4, and 2 GPUs answer; set cuda_gpu_count to 2, or mend the host."],
    ),
    (
        "2x80-mig",
        {},
        {},
        ["node1: MIG is on for GPU 0, which splits what the model needs whole; turn it off: nvidia-smi -mig 0."],
    ),
    (
        "2x80-ecc-off",
        {},
        {},
        [
            "node1: cuda_require_ecc is true, and ECC is off for GPUs 0 and 1; "
            "set cuda_require_ecc to false, or turn it on: nvidia-smi -e 1, then reboot."
        ],
    ),
    ("2x80-ecc-off", {}, {"require_ecc": False}, []),
    (
        "1x48-a6000",
        {"driver": "525.147.05"},
        {"gpu_count": 2},
        [
            "node1: the driver is 525.147.05, and profile cuda12 needs branch 530 or newer; "
            "set cuda_driver_branch to 580 and cuda_install to true.",
            "node1: cuda_gpu_count is 2, and 1 GPU answers; set cuda_gpu_count to 1, or mend the host.",
            "node1: cuda_require_ecc is true, and ECC is off for GPU 0; "
            "set cuda_require_ecc to false, or turn it on: nvidia-smi -e 1, then reboot.",
        ],
    ),
]


@pytest.mark.parametrize(("fixture", "changes", "wanted", "sentences"), CASES)
def test_what_stands_in_the_way(
    fixture: str, changes: dict[str, Any], wanted: dict[str, Any], sentences: list[str], tmp_path: Path
) -> None:
    assert problems(see(tmp_path, fixture, **changes), **wanted) == sentences


def test_no_driver_at_all(tmp_path: Path) -> None:
    PLACE(tmp_path, "1x80")
    assert problems(FACTS.facts(None, str(tmp_path / "sys"))) == [
        "node1: cuda_install is false, and there is no nvidia-smi; set cuda_install to true, "
        "or install a driver of branch 530 or newer, which profile cuda12 needs."
    ]


def test_a_driver_that_hangs_is_not_mended_by_installing(tmp_path: Path) -> None:
    seen = {**see(tmp_path, "no-devices"), "state": "hangs", "why": "nvidia-smi has not answered within 90 s"}
    assert problems(seen, install=True) == [
        "node1: the PCI bus shows 2 of NVIDIA's GPUs, and nvidia-smi has not answered within 90 s; "
        "reboot the host or mend it (dmesg names the reason)."
    ]


@pytest.mark.parametrize(
    ("fixture", "size", "gpus", "notice"),
    [
        ("2x80-nvlink", 2, [0, 1], "The service uses GPUs 0 and 1, which NVLink joins (NV12)."),
        ("2x80-nvlink", 1, [0], "The service uses GPU 0; GPU 1 stays free."),
        ("2x80-pcie", 2, [0, 1], "The service uses GPUs 0 and 1, which NVLink does not join (SYS): tensor parallelism goes over PCIe."),
        ("4x80-pairs", 2, [0, 1], "The service uses GPUs 0 and 1, which NVLink joins (NV12); GPUs 2 and 3 stay free."),
        ("4x80-pairs-crossed", 2, [0, 2], "The service uses GPUs 0 and 2, which NVLink joins (NV12); GPUs 1 and 3 stay free."),
        (
            "4x80-pairs-crossed",
            4,
            [0, 1, 2, 3],
            "The service uses GPUs 0, 1, 2 and 3, which NVLink does not join (NV12, SYS): tensor parallelism goes over PCIe.",
        ),
        ("8x80-nvswitch", 4, [0, 1, 2, 3], "The service uses GPUs 0, 1, 2 and 3, which NVLink joins (NV18); GPUs 4, 5, 6 and 7 stay free."),
        ("1x80", 2, [0], "The service uses GPU 0."),
    ],
)
def test_which_gpus_a_service_uses(fixture: str, size: int, gpus: list[int], notice: str, tmp_path: Path) -> None:
    seen = see(tmp_path, fixture)
    assert CUDA.cuda_gpus_for(seen, size) == gpus
    assert CUDA.cuda_notices(seen, size) == [notice]


def test_an_operator_chooses_otherwise(tmp_path: Path) -> None:
    seen = see(tmp_path, "4x80-pairs-crossed")
    assert CUDA.cuda_notices(seen, 2, [3, 1]) == ["The service uses GPUs 3 and 1, which NVLink joins (NV12); GPUs 0 and 2 stay free."]
    assert CUDA.cuda_record(seen, 2, [3, 1])["service_gpus"] == [3, 1]


def test_a_whole_group_comes_before_a_part_of_a_larger_one(tmp_path: Path) -> None:
    """GPU 0 to 3 are joined each with each, 4 and 5 are a pair: the four stay together for a service that needs four."""
    seen = see(tmp_path, "8x80-nvswitch")
    four = {f"{one}-{other}": "NV4" for one in range(4) for other in range(one + 1, 4)}
    seen["links"] = {pair: four.get(pair, "SYS") for pair in seen["links"]} | {"4-5": "NV4"}
    seen["nvlink_groups"] = FACTS.nvlink_groups(seen["links"])
    assert CUDA.cuda_gpus_for(seen, 2) == [4, 5]
    assert CUDA.cuda_gpus_for(seen, 3) == [0, 1, 2]
    assert CUDA.cuda_gpus_for(seen, 4) == [0, 1, 2, 3]


def test_persistence_is_noticed(tmp_path: Path) -> None:
    seen = see(tmp_path, "1x80", persistence=False)
    assert CUDA.cuda_notices(seen, 1)[1:] == ["Persistence mode is off for GPU 0: each start of the driver takes seconds more."]
    assert problems(seen) == []


REPOSITORY = "https://mirror.example/debian12/x86_64/"
OFFERS = """\
nvidia-driver-cuda | 580.82.07-1 | https://mirror.example/debian12/x86_64  Packages
nvidia-driver-cuda | 580.65.06-1 | https://mirror.example/debian12/x86_64  Packages
nvidia-driver-cuda | 570.124.06-1 | https://mirror.example/debian12/x86_64  Packages
nvidia-driver-cuda | 590.44.01-1 | https://elsewhere.example/debian12/x86_64  Packages
nvidia-kernel-open-dkms | 580.82.07-2 | https://mirror.example/debian12/x86_64  Packages
nvidia-kernel-open-dkms | 580.65.06-1 | https://mirror.example/debian12/x86_64  Packages
"""
KNOWN = """\
nvidia-driver-cuda | 580.95.05-1 | https://mirror.example/debian12/x86_64  Packages
linux-headers-6.1.0-40-amd64 | 6.1.153-1 | http://deb.debian.org/debian bookworm/main amd64 Packages
"""
SEEN = {"problem": "", "key": "a key", "offers": OFFERS, "known": KNOWN, "blind": False}
HEADERS = "linux-headers-6.1.0-40-amd64"
ASKED: dict[str, Any] = {
    "host": "node1", "repository": REPOSITORY, "branch": 580, "version": "", "packages": ["nvidia-driver-cuda", "nvidia-kernel-open-dkms"],
    "others": {"cuda_kernel_headers": HEADERS}, "pinned": False,
}  # fmt: skip
DPKG = f"""\
nvidia-driver-cuda 580.65.06-1 hold installed
nvidia-kernel-open-dkms 580.65.06-1 hold installed
libcuda1 580.65.06-1 install installed
libnvidia-egl-gbm1 1.1.2-1 install installed
nvidia-settings 535.1-1 deinstall config-files
{HEADERS} 6.1.153-1 install installed
"""


def release(dpkg: str = "", seen: dict[str, Any] = SEEN, **asked: Any) -> dict[str, Any]:
    wanted = {**ASKED, **asked}
    result: dict[str, Any] = CUDA.cuda_release(seen, CUDA.cuda_state(dpkg, wanted), wanted)
    return result


def test_what_is_installed() -> None:
    assert CUDA.cuda_state(DPKG, ASKED) == {
        "driver": "580.65.06",
        "complete": True,
        "installed": {
            "nvidia-driver-cuda": "580.65.06-1",
            "nvidia-kernel-open-dkms": "580.65.06-1",
            "libcuda1": "580.65.06-1",
            "libnvidia-egl-gbm1": "1.1.2-1",
            HEADERS: "6.1.153-1",
        },
        "held": ["nvidia-driver-cuda", "nvidia-kernel-open-dkms"],
        "loose": ["libcuda1"],
    }


@pytest.mark.parametrize(
    "asked",
    [
        {"branch": 570},
        {"version": "580.82.07"},
        {"packages": ["nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-fabricmanager"]},
        {"others": {"cuda_toolkit": "cuda-toolkit-12-1"}},
    ],
)
def test_something_is_missing(asked: dict[str, Any]) -> None:
    assert CUDA.cuda_state(DPKG, {**ASKED, **asked})["complete"] is False


def test_nothing_is_asked_for_where_nothing_is_missing() -> None:
    """The repository was not asked: the task was skipped."""
    assert release(DPKG, {"skipped": True}) == {"driver": "580.65.06", "packages": [], "key": "", "problems": []}


@pytest.mark.parametrize(
    ("version", "driver", "packages"),
    [
        ("", "580.82.07", ["nvidia-driver-cuda=580.82.07-1", "nvidia-kernel-open-dkms=580.82.07-2", HEADERS]),
        ("580.65.06", "580.65.06", ["nvidia-driver-cuda=580.65.06-1", "nvidia-kernel-open-dkms=580.65.06-1", HEADERS]),
    ],
)
def test_the_packages_of_a_driver(version: str, driver: str, packages: list[str]) -> None:
    assert release(version=version) == {"driver": driver, "packages": packages, "key": "a key", "problems": []}


def test_what_is_installed_stays_when_a_part_is_added() -> None:
    """And not the newest of the branch: the parts have one version."""
    dpkg = DPKG.replace("nvidia-kernel-open-dkms 580.65.06-1 hold installed\n", "")
    assert release(dpkg)["packages"][:2] == ["nvidia-driver-cuda=580.65.06-1", "nvidia-kernel-open-dkms=580.65.06-1"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            {"version": "580.99.99"},
            f"cuda_driver_version is '580.99.99', which {REPOSITORY} does not have; set it to one of 580.82.07, 580.65.06.",
        ),
        (
            {"version": "570.124.06"},
            "cuda_driver_version is '570.124.06', and cuda_driver_branch is 580; set cuda_driver_branch to 570.",
        ),
        ({"branch": 590}, f"cuda_driver_branch is 590, which {REPOSITORY} does not have; set it to one of 570, 580."),
        (
            {"branch": 570},
            f"cuda_driver_branch is 570, and {REPOSITORY} has no nvidia-kernel-open-dkms of 570.124.06; "
            "set cuda_driver_version to another one, or cuda_packages to what it has.",
        ),
        (
            {"repository": "https://empty.example/"},
            "cuda_repository_url is 'https://empty.example/', which has no package nvidia-driver-cuda; "
            "set it to a repository of NVIDIA's drivers.",
        ),
        (
            {"others": {"cuda_kernel_headers": "linux-headers-6.1.0-1-amd64"}},
            "cuda_kernel_headers asks for the package linux-headers-6.1.0-1-amd64, which no repository of this host has; "
            "set cuda_kernel_headers to one that exists.",
        ),
        (
            {"others": {"cuda_toolkit": "cuda-toolkit-11-0"}},
            "cuda_toolkit asks for the package cuda-toolkit-11-0, which no repository of this host has; "
            "set cuda_toolkit to one that exists.",
        ),
    ],
)
def test_what_a_repository_lacks(asked: dict[str, Any], sentence: str) -> None:
    assert release(**asked)["problems"] == [f"node1: {sentence}"]


def test_a_host_without_lists_of_packages_is_not_asked_for_headers() -> None:
    seen = {**SEEN, "known": "", "blind": True}
    assert release(seen=seen)["problems"] == []


def test_what_the_repository_module_says_is_passed_on() -> None:
    assert release(seen={"problem": "the key is wrong.", "key": "", "offers": "", "blind": False})["problems"] == [
        "node1: the key is wrong."
    ]


HELD = "nvidia-driver-cuda 535.183.06-1 hold installed\nlibcuda1 535.183.06-1 hold installed\n"


def test_a_hold_of_somebody_else() -> None:
    assert release(HELD)["problems"] == [
        "node1: cuda_driver_branch is 580, and the host holds libcuda1 at 535.183.06-1; "
        "set cuda_driver_branch to 535, or release it: apt-mark unhold libcuda1 nvidia-driver-cuda."
    ]


def test_the_roles_own_hold_is_none() -> None:
    assert release(HELD, pinned=True)["problems"] == []


def test_what_is_recorded_does_not_change_by_itself(tmp_path: Path) -> None:
    before = CUDA.cuda_record(see(tmp_path, "4x80-pairs-crossed"), 2)
    seen = see(tmp_path, "4x80-pairs-crossed")
    for gpu in seen["gpus"]:
        gpu["memory_free_mib"] -= 1000
    assert CUDA.cuda_record(seen, 2) == before
    assert before["service_gpus"] == [0, 2]
    assert "raw" not in before


def test_an_installed_driver_that_does_not_answer(tmp_path: Path) -> None:
    assert problems(see(tmp_path, "no-driver"), install=True, installed=True) == [
        "node1: a driver of branch 580 is installed, and nvidia-smi does not reach the NVIDIA driver; see what dmesg and `dkms status` say."
    ]


def test_names_of_packages_fit_distribution_and_branch(tmp_path: Path) -> None:
    """What roles/cuda/vars says, as a playbook sees it."""
    playbook = tmp_path / "names.yml"
    tasks = [
        {"ansible.builtin.debug": {"msg": f"{file.stem} {branch} {{{{ __cuda_packages | join(' ') }}}} {{{{ __cuda_fabricmanager }}}}"},
         "vars": {**yaml.safe_load(file.read_text()), "cuda_driver_branch": branch}}
        for file in sorted(ROOT.glob("roles/cuda/vars/*-*.yml"))
        for branch in (570, 580, 590)
    ]  # fmt: skip
    playbook.write_text(yaml.safe_dump([{"hosts": "localhost", "gather_facts": False, "connection": "local", "tasks": tasks}]))
    said = re.findall(r'"msg": "(.*)"', ansible_playbook("-i", "localhost,", playbook).stdout)
    debian = "nvidia-driver-cuda nvidia-kernel-open-dkms nvidia-persistenced"
    old, new = "libnvidia-compute-{0} nvidia-dkms-{0}-open nvidia-utils-{0}", "libnvidia-compute nvidia-dkms-open nvidia-persistenced"
    assert said == [
        f"debian-12 570 {debian} nvidia-fabricmanager-570",
        f"debian-12 580 {debian} nvidia-fabricmanager",
        f"debian-12 590 {debian} nvidia-fabricmanager",
        *[f"debian-13 {branch} {debian} nvidia-fabricmanager" for branch in (570, 580, 590)],
        *[
            line
            for ubuntu in ("ubuntu-22", "ubuntu-24")
            for line in (
                f"{ubuntu} 570 {old.format(570)} nvidia-fabricmanager-570",
                f"{ubuntu} 580 {old.format(580)} nvidia-fabricmanager",
                f"{ubuntu} 590 {new} nvidia-fabricmanager",
            )
        ],
    ]
