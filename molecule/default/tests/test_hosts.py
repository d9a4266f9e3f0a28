"""The lab's hosts: systems with what roles and their tests rely on."""

import pytest


@pytest.fixture(params=["gw1", "node1"])
def host(request, on):
    return on(request.param)


def test_systemd_runs_and_nothing_failed(host):
    assert host.check_output("cat /proc/1/comm") == "systemd"
    assert host.check_output("systemctl is-system-running") == "running"


@pytest.mark.parametrize(("name", "address"), [("gw1", ".11"), ("node1", ".21")])
def test_own_address_and_names_of_the_others(on, inventory, name, address):
    prefix = inventory(name, "lab_network_prefix")
    assert on(name).interface("eth0").addresses[0] == prefix + address
    for other, last in (("gw1", ".11"), ("node1", ".21")):
        assert on(name).check_output(f"getent hosts {other}").split()[0] == prefix + last
    assert on(name).check_output("hostname") == name


def test_hosts_reach_each_other(on):
    assert on("gw1").run("nc -z node1 22 || timeout 2 bash -c '</dev/tcp/node1/22'").rc == 0


def test_keys_are_the_hosts_own(on):
    keys = {on(name).check_output("cat /etc/ssh/ssh_host_ed25519_key.pub") for name in ("gw1", "node1")}
    assert len(keys) == 2
    assert len({on(name).check_output("cat /etc/machine-id") for name in ("gw1", "node1")}) == 2


def test_credentials_reach_a_unit(host):
    assert host.check_output("cat /var/lib/lab-unit/word") == f"secret of {host.check_output('hostname')}"


def test_limit_of_memory_is_enforced(on):
    """A process over its limit is killed; without the limit it is not."""
    eat = 'python3 -c "b = bytearray(100 << 20)"'
    limited = on("gw1").run(f"systemd-run --wait --quiet -p MemoryMax=32M -p MemorySwapMax=0 {eat} || echo killed")
    assert limited.stdout.split() == ["killed"]
    assert on("gw1").run(f"systemd-run --wait --quiet {eat}").rc == 0


def test_sandboxing_is_real(host):
    pid = host.check_output("systemctl show -p MainPID --value lab-unit")
    assert host.run(f"nsenter -t {pid} -m touch /etc/written").rc != 0


def test_nftables_filters(on):
    gateway = on("gw1")
    gateway.check_output(
        "nft -f - <<'END'\ntable inet lab { chain in { type filter hook input priority 0; tcp dport 7777 drop; }; }\nEND\n"
    )
    gateway.check_output("systemd-run --quiet --unit=lab-listen python3 -m http.server 7777")
    try:
        reach = "timeout 2 bash -c 'until </dev/tcp/gw1/7777; do sleep 0.1; done' 2>/dev/null"
        assert on("node1").run(reach).rc != 0
        gateway.check_output("nft delete table inet lab")
        assert on("node1").run(reach).rc == 0
    finally:
        gateway.run("systemctl stop lab-listen; nft delete table inet lab")


def test_reboot_is_one(on):
    node = on("node1")
    assert node.check_output("cat /root/boot_id") != node.check_output("cat /proc/sys/kernel/random/boot_id")
    assert node.service("lab-unit").is_running
    assert "before-the-reboot" in node.check_output("journalctl --no-pager -b -1")


def test_settings_of_the_kernel_are_the_hosts_alone(host):
    from pathlib import Path

    assert host.check_output("cat /proc/sys/vm/max_map_count") == "262145"
    assert Path("/proc/sys/vm/max_map_count").read_text().strip() != "262145"


def test_packages_come_through_the_cache(host, inventory):
    prefix = inventory("gw1", "lab_network_prefix")
    assert f"http://{prefix}.1:3142" in host.check_output("apt-config dump Acquire::http::Proxy")
    assert host.run("apt-get install --download-only -y -q hello").rc == 0
