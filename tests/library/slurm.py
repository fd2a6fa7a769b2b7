"""A real Slurm on one machine: munged, slurmctld and a slurmd for each of n1 and n2, in one network namespace.

Configuration, state and sockets lie in a temporary folder. `close` ends every process of the namespace, by its id.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.library.network import SYSTEM_PATH, kill_all, pids_in, sh
from tests.library.paths import ROOT

ADDRESS = "10.79.0.1"
ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")


class Slurm:
    """Nodes n1 and n2 with two CPUs each, up until `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"gkd{os.getpid()}slurm"
        self.daemons: list[subprocess.Popen] = []
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}", "HOME": str(folder),
            "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "LANG": "C.UTF-8",
        }  # fmt: skip
        self._configure()
        try:
            sh(f"ip netns add {self.name}")
            # Slurm looks names up only for families of which an interface other than lo has an address.
            sh(f"ip -n {self.name} link add lan0 type veth peer name lan1")
            for device in ("link set lo up", f"addr add {ADDRESS}/24 dev lan0", "link set lan0 up", "link set lan1 up"):
                sh(f"ip -n {self.name} {device}")
            key, socket = folder / "munge.key", folder / "munge.socket"
            key.write_bytes(os.urandom(128))
            key.chmod(0o400)
            files = [f"--{kind}-file={folder / f'munge.{kind}'}" for kind in ("key", "log", "pid", "seed")]
            self._start(["munged", "--foreground", "--force", f"--socket={socket}", *files])
            self._until(socket.exists)
            self._start(["slurmctld", "-D"])
            for node in ("n1", "n2"):
                self._start(["slurmd", "-D", "-N", node])
            self._until(lambda: self.run(["sinfo", "-h", "-o", "%T %D"], check=False).strip() == "idle 2")
        except BaseException:
            self.close()
            raise

    def _configure(self) -> None:
        folder, host = self.folder, os.uname().nodename
        for name in ("state", "spool_n1", "spool_n2"):
            (folder / name).mkdir()
        nodes = "".join(
            f"NodeName=n{i} NodeHostname={host} NodeAddr={ADDRESS} Port={17000 + i} CPUs=2 State=UNKNOWN\n"
            for i in (1, 2)
        )
        # cred_expire is also how long a requeued job waits before it starts again (by default two minutes).
        (folder / "slurm.conf").write_text(
            f"ClusterName=test\nSlurmctldHost={host}({ADDRESS})\nSlurmctldPort=17000\nSlurmUser=root\nSlurmdUser=root\n"
            f"AuthType=auth/munge\nAuthInfo=socket={folder / 'munge.socket'},cred_expire=5\nCryptoType=crypto/munge\n"
            f"StateSaveLocation={folder / 'state'}\nSlurmdSpoolDir={folder}/spool_%n\n"
            f"SlurmctldPidFile={folder}/ctld.pid\nSlurmdPidFile={folder}/%n.pid\n"
            f"SlurmctldLogFile={folder}/ctld.log\nSlurmdLogFile={folder}/%n.log\n"
            "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSwitchType=switch/none\nMpiDefault=none\n"
            "JobAcctGatherType=jobacct_gather/none\nAccountingStorageType=accounting_storage/none\n"
            "SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nReturnToService=2\nKillWait=30\n"
            "SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0\nGresTypes=gpu\n"
            f"{nodes}PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
        )

    def _start(self, words: list[str]) -> None:
        log = open(self.folder / f"{words[0]}.out", "a")
        command = ["nsenter", f"--net=/run/netns/{self.name}", *words]
        self.daemons.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        )

    def _until(self, ready, deadline_s: float = 60) -> None:
        end = time.monotonic() + deadline_s
        while not ready():
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in self.daemons):
                logs = {path.name: path.read_text()[-2000:] for path in self.folder.glob("*.out")}
                logs |= {path.name: path.read_text()[-2000:] for path in self.folder.glob("*.log")}
                raise RuntimeError("\n".join(f"--- {name}\n{text}" for name, text in logs.items()))
            time.sleep(0.2)

    def run(self, words: list[str], check: bool = True) -> str:
        command = ["nsenter", f"--net=/run/netns/{self.name}", f"--wd={ROOT}", *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout

    def submit(self, output: Path, words: list[str]) -> str:
        """Submit launch/slurm.sbatch for two tasks on each node; returns the job's number."""
        flags = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", f"--output={output}", "--time=10"]
        return self.run(["sbatch", "--parsable", *flags, "launch/slurm.sbatch", *words]).strip()

    def state(self, job: str) -> str:
        shown = dict(part.split("=", 1) for part in self.run(["scontrol", "show", "job", job]).split() if "=" in part)
        return shown["JobState"]

    def finish(self, job: str, deadline_s: float) -> str:
        """The state in which the job ends."""
        end = time.monotonic() + deadline_s
        while (state := self.state(job)) in ACTIVE:
            if time.monotonic() > end:
                raise AssertionError(f"job {job} is still {state} after {deadline_s} s")
            time.sleep(0.5)
        return state

    def close(self) -> None:
        if Path(f"/run/netns/{self.name}").exists():
            kill_all(pids_in(self.name))
            sh(f"ip netns del {self.name}")
        for daemon in self.daemons:
            daemon.wait()
