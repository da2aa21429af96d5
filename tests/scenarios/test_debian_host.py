"""An ordinary Debian host: the steps of deploy/README.md, done as they are written, on machines with a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from tests.harness.cluster import eventually
from tests.harness.machines import Machine, joined_machines, missing, steps_of

ROOT = Path(__file__).parents[2]
README = ROOT / "deploy" / "README.md"
CHECKOUT = "/opt/checkout"
PASSWORD = "Ein gutes Wort"

pytestmark = [pytest.mark.campaign, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The programs as step 2 installs them, made once: it is the one step that needs a network."""
    source = tmp_path_factory.mktemp("source") / "pmgsync"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "__pycache__"))
    opt = tmp_path_factory.mktemp("opt")
    script = f"mount --bind {opt} /opt && cd {source} && " + " && ".join(install_step().splitlines()[:2])
    subprocess.run(["unshare", "--mount", "sh", "-ec", script], check=True, timeout=300)
    yield opt
    shutil.rmtree(opt)


def install_step() -> str:
    return next(step for step in steps_of(README.read_text()) if "pip install" in step)


def follow_readme(machine: Machine) -> None:
    """Do what deploy/README.md says, line by line; by hand is only what it says to set in node.toml."""
    machine.sh("pg_dropcluster 15 main 2>/dev/null || true; pg_createcluster 15 main --locale C.UTF-8")
    hba = machine.sh("cat /etc/postgresql/15/main/pg_hba.conf").stdout
    assert re.search(r"^local\s+all\s+all\s+peer$", hba, re.MULTILINE), "as Debian installs it"
    machine.transcript.clear()
    for step in steps_of(README.read_text()):
        lines = step.splitlines()
        if "pip install" in step:
            lines = lines[2:]
        machine.sh(f"cd {CHECKOUT}\n" + "\n".join(lines))
        if "node.toml" in step:
            machine.sh(f"sed -i 's/^address = .*/address = \"{machine.address}\"/' /etc/pmgsync/node.toml")
    assert machine.sh("cat /etc/postgresql/15/main/pg_hba.conf").stdout == hba
    machine.sh("createdb -T template0 -E SQL_ASCII -l C Proxmox_ruledb")
    machine.sh("psql -qX -d Proxmox_ruledb -f -", given=(resources.files("cli.demo") / "pmg_schema.sql").read_text())
    machine.sh("install -D -m 0640 -g www-data /dev/null /etc/pmg/cluster.conf")


def test_three_debian_hosts_become_a_cluster(programs: Path) -> None:
    shown = {"/opt/pmgsync": programs / "pmgsync", CHECKOUT: ROOT}
    with joined_machines(["pmg1", "pmg2", "pmg3"], shown) as machines:
        try:
            master, second, third = machines
            for machine in machines:
                follow_readme(machine)
            master.sh("pmgcm create --name mail")
            line = master.sh("pmgcm join-cmd").stdout.strip().splitlines()[-1]
            assert line.startswith(f"pmgcm join {master.address} --port 7672 ")
            second.sh(f"{line} --yes")
            # The other way: nothing but the address, and the password of root on the master.
            master.sh("chpasswd", given=f"root:{PASSWORD}\n")
            del master.transcript[-2:]
            known = line.partition(" --token")[0]
            wrong = third.sh(f"printf wrong > /root/w; {known} --yes --password-file /root/w", check=False)
            assert wrong.returncode == 1
            assert "does not accept this token or password" in wrong.stderr
            fingerprint = line.split("--fingerprint ")[1].split()[0]
            said = third.answer(
                f"pmgcm join {master.address}",
                [("Is it the master's?", "yes"), ("password of root on the master", PASSWORD), ("Go on?", "yes")],
            )
            assert fingerprint in said
            assert PASSWORD not in said
            logs = "".join(machine.sh("cat /var/log/pmgsync-*.log").stdout for machine in machines)
            for machine in machines:
                del machine.transcript[-2:]
            assert "action=join-attempt" in logs
            assert PASSWORD not in logs
            master.sh("pmgcm wait --timeout 60")
            master.sh("psql -qX Proxmox_ruledb -c \"INSERT INTO rule (name, priority) VALUES ('first', 1)\"")
            master.sh("pmgcm wait --timeout 60")
            for machine in machines:
                assert machine.sh("psql -XAt Proxmox_ruledb -c 'SELECT name FROM rule'").stdout == "first\n"
                conf = machine.sh("cat /etc/pmg/cluster.conf").stdout
                roles = re.findall(r"^(master|node): (\d)$", conf, re.MULTILINE)
                assert roles == [("master", "1"), ("node", "2"), ("node", "3")]
                assert machine.sh("stat -c '%a %U:%G' /etc/pmg/cluster.conf").stdout == "640 root:www-data\n"
                assert machine.sh("find /var/lib/pmgsync -perm /077").stdout == ""
            eventually(lambda: master.sh("pmgcm status", check=False).returncode == 0, what="all are in step")
            assert json.loads(master.sh("pmgcm doctor --json", check=False).stdout)["ok"]
            master.sh("pmgcm status")
        finally:
            for machine in machines:
                print("\n".join(machine.transcript))
                print(machine.sh("tail -n 20 /var/log/pmgsync-*.log", check=False).stdout)
