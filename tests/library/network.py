"""Two hosts on one machine: a network namespace, a hostname, an interface and an sshd each, joined by a veth pair.

The addresses exist inside these namespaces only; keys and ssh configuration lie in a temporary folder, and an `ssh`
first on the hosts' PATH uses them. The file system is shared, but each host has its own mounts. `close` ends every
process that was started in a host, by its id, and takes the namespaces away.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.library.paths import ROOT

HOSTS = {"n1": "10.77.0.1", "n2": "10.77.0.2"}
INTERFACE = "lan0"
SYSTEM_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
NEEDED = {
    "ip": "iproute2", "unshare": "util-linux", "sshd": "openssh-server", "pdsh": "pdsh", "mpirun": "openmpi-bin",
    "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "munged": "munge",
}  # fmt: skip


def why_not() -> str | None:
    """Why this machine cannot have such hosts; None where it can."""
    return missing_packages() or no_namespaces()


def missing_packages() -> str | None:
    """Which Debian packages are not there, by the programs wanted of them."""
    missing = {package for program, package in NEEDED.items() if shutil.which(program, path=SYSTEM_PATH) is None}
    return f"not installed: {', '.join(sorted(missing))}" if missing else None


def no_namespaces() -> str | None:
    """Why a network namespace with a veth pair and mounts of its own cannot be made; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"gkd{os.getpid()}probe"
    try:
        sh(f"ip netns add {name}")
        try:
            sh(f"ip -n {name} link add lan0 type veth peer name lan1")
            sh(f"nsenter --net=/run/netns/{name} unshare --uts --mount mount -t tmpfs tmpfs /run")
        finally:
            sh(f"ip netns del {name}")
    except RuntimeError as error:
        return str(error)
    return None


class Network:
    """Hosts n1 and n2, up until `close`. `folder` is empty and stays until the caller removes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = {host: f"gkd{os.getpid()}{host}" for host in HOSTS}
        self.daemons: dict[str, subprocess.Popen] = {}
        self.environment = self._write_ssh_files()
        try:
            for name in self.name.values():
                sh(f"ip netns add {name}")
            n1, n2 = self.name.values()
            sh(f"ip link add {INTERFACE} netns {n1} type veth peer name {INTERFACE} netns {n2}")
            for host, address in HOSTS.items():
                for device in (f"addr add {address}/24 dev {INTERFACE}", "link set lo up", f"link set {INTERFACE} up"):
                    sh(f"ip -n {self.name[host]} {device}")
                self.start_sshd(host)
        except BaseException:
            self.close()
            raise

    def _write_ssh_files(self) -> dict[str, str]:
        """Keys, the two configurations and the `ssh` that uses them; returns the hosts' environment."""
        folder = self.folder
        for key in ("host_key", "user_key"):
            sh(f"ssh-keygen -q -t ed25519 -N '' -f {folder / key}")
        public = (folder / "host_key.pub").read_text()
        (folder / "known_hosts").write_text("".join(f"{host} {public}" for host in HOSTS))
        (folder / "ssh_config").write_text(
            f"Host {' '.join(HOSTS)}\n  User root\n  IdentityFile {folder / 'user_key'}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {folder / 'known_hosts'}\n  StrictHostKeyChecking yes\n"
        )
        (folder / "sshd_config").write_text(
            f"HostKey {folder / 'host_key'}\nAuthorizedKeysFile {folder / 'user_key.pub'}\nStrictModes no\n"
            f"PermitRootLogin prohibit-password\nUsePAM no\nPidFile none\nMaxStartups 50\n"
        )
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {h}\n" for h, a in HOSTS.items()))
        (folder / "hostfile").write_text("".join(f"{host} slots=2\n" for host in HOSTS))
        (folder / "bin").mkdir()
        (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder / "ssh_config"} "$@"\n')
        (folder / "bin" / "ssh").chmod(0o755)
        path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{SYSTEM_PATH}"
        return {
            "PATH": path, "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline",
            "HF_HUB_OFFLINE": "1", "HOSTFILE": str(folder / "hostfile"), "IFNAME": INTERFACE, "LANG": "C.UTF-8",
        }  # fmt: skip

    def start_sshd(self, host: str, before: str = "true") -> None:
        """Bring the host up, in namespaces of its own, after the shell command `before` in them."""
        # A file system of the host's own on /run: sshd wants a folder there, and the machine's stays as it is.
        prepare = (
            f"mount --bind {self.folder / 'hosts'} /etc/hosts && mount -t tmpfs tmpfs /run && mkdir /run/sshd && "
            f"hostname {host} && {before} && exec /usr/sbin/sshd -D -e -f {self.folder / 'sshd_config'}"
        )
        log = open(self.folder / f"sshd_{host}.log", "a")
        self.daemons[host] = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.name[host]}", "unshare", "--uts", "--mount", "sh", "-c", prepare],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + 20
        while "Server listening" not in (self.folder / f"sshd_{host}.log").read_text():
            if self.daemons[host].poll() is not None or time.monotonic() > end:
                raise RuntimeError((self.folder / f"sshd_{host}.log").read_text())
            time.sleep(0.05)
        time.sleep(0.1)

    def stop_sshd(self, host: str) -> None:
        """Take a host down: its sshd and everything in its network namespace."""
        kill_all(pids_in(self.name[host]))
        self.daemons.pop(host).wait()
        (self.folder / f"sshd_{host}.log").unlink()

    def restart(self, host: str, before: str = "true") -> None:
        self.stop_sshd(host)
        self.start_sshd(host, before)

    def set_link(self, host: str, state: str) -> None:
        sh(f"ip -n {self.name[host]} link set {INTERFACE} {state}")

    def sent_bytes(self, host: str) -> int:
        """Bytes that the host has sent to the other one."""
        path = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
        # /sys shows the namespace in which it was mounted.
        command = ["ip", "netns", "exec", self.name[host], "cat", path]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def start(self, host: str, words: list[str], **environment: str) -> subprocess.Popen:
        """Start a command on a host, in the repository's root; stdout and stderr together."""
        enter = ["nsenter", "--target", str(self.daemons[host].pid), "--net", "--uts", "--mount", f"--wd={ROOT}"]
        return subprocess.Popen(
            [*enter, *words], env=self.environment | environment, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, host: str, words: list[str], deadline_s: float = 200, **environment: str) -> tuple[int, str]:
        """Exit status and output of a command on a host; past the deadline, everything on the hosts is ended."""
        return self.wait(self.start(host, words, **environment), deadline_s)

    def wait(self, process: subprocess.Popen, deadline_s: float) -> tuple[int, str]:
        try:
            output, _ = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            kill_all([pid for host in HOSTS for pid in pids_in(self.name[host])])
            output, _ = process.communicate()
            raise AssertionError(f"no end after {deadline_s} s: {process.args}\n{output[-5000:]}") from None
        return process.returncode, output

    def close(self) -> None:
        for name in self.name.values():
            if Path(f"/run/netns/{name}").exists():
                kill_all(pids_in(name))
                sh(f"ip netns del {name}")
        for daemon in self.daemons.values():
            daemon.wait()


def sh(command: str) -> str:
    environment = os.environ | {"PATH": SYSTEM_PATH}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")
    return done.stdout


def pids_in(namespace: str) -> list[int]:
    """Processes in a network namespace, which only those we started can be in."""
    return [int(pid) for pid in sh(f"ip netns pids {namespace}").split()]


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # ended by itself
