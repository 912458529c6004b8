"""A real Slurm of two nodes on this machine, from Debian's packages `slurm-wlm` and `munge`: a context that starts and ends it."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from launch.cluster.processes import end, with_variable

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
CONF = """\
ClusterName=limi
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MpiDefault=none
ReturnToService=2
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES State=UP PriorityTier=1 GraceTime=120 PreemptMode=REQUEUE
PartitionName=high Nodes=n1,n2 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    return [name for name in NEEDED if not shutil.which(name, path=path)]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment in which Slurm's commands find the two nodes. Everything has ended after the block."""
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    folder.chmod(0o755)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, ports=_free_ports(3)))
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    env |= {"SLURM_CONF": str(conf), "PATH": f"{env['PATH']}:/usr/sbin"}
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}", f"--pid-file={folder}/m.pid",
         f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]  # fmt: skip
    started: list[subprocess.Popen[bytes]] = []
    try:
        for daemon in daemons:
            log = (folder / f"{'-'.join(daemon).replace('/', '_')[:40]}.out").open("wb")
            started.append(subprocess.Popen(daemon, env=env, stdout=log, stderr=log, start_new_session=True))
            time.sleep(0.5)
        _wait_for_nodes(env)
        yield env
    finally:
        subprocess.run(["scancel", "--user=root", "--signal=KILL"], env=env, capture_output=True)
        end(with_variable("SLURM_CONF", str(conf)), patience=10.0)  # what jobs of a failed test left
        for one in reversed(started):
            with contextlib.suppress(ProcessLookupError):
                one.send_signal(signal.SIGTERM)
        for one in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.wait(10)
            if one.poll() is None:
                one.kill()


def _wait_for_nodes(env: dict[str, str]) -> None:
    deadline = time.monotonic() + 60
    while True:
        there = subprocess.run(["sinfo", "--noheader", "-N", "-o", "%N %t"], env=env, capture_output=True, text=True)
        idle = {line.split()[0] for line in there.stdout.splitlines() if line.split()[1] == "idle"}
        if idle == {"n1", "n2"}:
            return
        assert time.monotonic() < deadline, there.stdout + there.stderr
        time.sleep(0.5)
