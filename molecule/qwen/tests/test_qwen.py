"""Role qwen: words and checks only. Wrong inventories are in tests/test_inventories.py, as they need no host."""


def test_it_leaves_no_trace_on_a_host(on):
    host = on("mon1")
    assert host.check_output("find / -xdev -iname '*qwen*' -not -path '/proc/*' -not -path '/sys/*'") == ""
    assert host.run("getent passwd qwen-coder").rc == 2
