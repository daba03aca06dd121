"""The launch scripts, with stand-ins for the programs of a cluster: their output matches their calls."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers import call as process
from helpers import run, wait_until

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def cluster(tmp_path):
    """A folder of programs in front of PATH: `add(name, bash)`. Each notes its arguments in calls/NAME."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "calls").mkdir()

    def add(name, body=""):
        file = tmp_path / "bin" / name
        file.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" END >> {tmp_path}/calls/{name}\n{body}\n')
        file.chmod(0o755)

    add.folder = tmp_path
    return add


def call(cluster, script, *arguments, cwd=None, code=0):
    folder = cluster.folder
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(folder)}
    environment["JAXTRAIN_TOKEN"] = "secret's"
    # Not Python's, in which the program would be found that these tests replace.
    command = ["bash", script if Path(script).is_absolute() else SCRIPTS / script, *arguments]
    done = process(command, env=environment, cwd=cwd or folder)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def calls(cluster, name):
    """The argument lists with which a program was called."""
    file = cluster.folder / "calls" / name
    if not file.exists():
        return []
    return [call.split("\0")[:-1] for call in file.read_bytes().decode().split("END\0")[:-1]]


@pytest.mark.parametrize("script", ["launch_tpu_vm", "launch_slurm"])
def test_help_is_the_head_of_the_script(cluster, script):
    text = call(cluster, script, "--help")
    assert f"scripts/{script}" in text
    assert "--dry-run" in text
    assert "set -e" not in text


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("launch_tpu_vm", ["--zone", "z", "--", "c.py"], "give the name"),
        ("launch_tpu_vm", ["me", "--", "c.py"], "give the --zone of me"),
        ("launch_tpu_vm", ["me", "--zone"], "--zone needs a value"),
        ("launch_tpu_vm", ["me", "--zone", "z"], "give a config"),
        ("launch_tpu_vm", ["me", "--zone", "z", "c.py"], "CONFIG goes after --"),
        ("launch_tpu_vm", ["me", "--zone", "z", "--train.steps", "3"], "unknown option --train.steps"),
        ("launch_tpu_vm", ["me", "--zone", "--dry-run", "--", "c.py"], "--zone needs a value"),
        ("launch_tpu_vm", ["me", "--zone", "z", "--", ""], "give a config"),
        ("launch_slurm", [], "give a config"),
        ("launch_slurm", ["--", ""], "give a config"),
        ("launch_slurm", ["--name", "--dry-run", "--", "c.py"], "--name needs a value"),
        ("launch_slurm", ["--gpus-per-node", "08", "--", "c.py"], "--gpus-per-node must be a number, got 08"),
        ("launch_slurm", ["c.py"], "unknown option c.py"),
        ("launch_slurm", ["--nodes", "two", "--", "c.py"], "--nodes must be a number above 0, got two"),
        *(
            ("launch_slurm", [f"--{option}", value, "--", "c.py"], f"--{option} needs a value")
            for option in ("name", "time", "partition", "account", "nodes", "gpus-per-node")
            for value in ("-x", "")
        ),
        ("launch_slurm", ["--name", ".x", "--", "c.py"], "--name begins with a letter or digit and may have ._:,@+-"),
        ("launch_slurm", ["--time", "1h", "--", "c.py"], "--time must be MINUTES, [DAYS-]HH:MM:SS or DAYS-HH, got 1h"),
        ("launch_slurm", ["--nodes", "9" * 20, "--", "c.py"], "--nodes must be a number above 0"),
        ("launch_slurm", ["--", "--train.steps", "5"], "give a config"),
        ("launch_tpu_vm", ["me", "--zone", "z", "--", "--train.steps", "5"], "give a config"),
        ("launch_tpu_vm", ["me", "--zone", "z", "--project", "", "--", "c.py"], "--project needs a value"),
        ("launch_tpu_vm", ["me", "--zone", "a b", "--", "c.py"], "--zone may have a-z, 0-9 and .:- only, got a b"),
    ],
)
def test_a_wrong_command_runs_nothing_and_says_why(cluster, script, arguments, message):
    cluster("gcloud")
    cluster("sbatch")
    assert message in call(cluster, script, *arguments, code=2)
    assert calls(cluster, "gcloud") == calls(cluster, "sbatch") == []


CONFIG = ["--", "configs/quickstart.py", "--run-dir", "/mnt/shared/a b's", "--train.steps", "5"]


def test_slurm_dry_run_prints_the_job_that_is_submitted(cluster):
    cluster("sbatch", f"cat > {cluster.folder}/job")
    cluster("jaxtrain")
    arguments = ["--nodes", "2", "--gpus-per-node", "4", "--partition", "p", "--account", "a", *CONFIG]
    dry = call(cluster, "launch_slurm", "--dry-run", *arguments)
    assert calls(cluster, "sbatch") == []
    assert not (cluster.folder / "runs").exists()
    call(cluster, "launch_slurm", *arguments)
    job = (cluster.folder / "job").read_text()
    assert dry == f'mkdir -p runs/logs\nsbatch << "END"\n{job}END\n'
    assert (cluster.folder / "runs" / "logs").is_dir()
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", job, re.MULTILINE))
    assert settings == {
        **{"job-name": "quickstart", "nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "time": "24:00:00"},
        **{"partition": "p", "account": "a", "dependency": "singleton", "requeue": "", "signal": "TERM@180"},
        **{"open-mode": "append", "output": "runs/logs/%x.log"},
    }


def test_slurm_without_gpus_is_one_process_a_node(cluster):
    job = call(cluster, "launch_slurm", "--gpus-per-node", "0", "--name", "mine", "--dry-run", *CONFIG)
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --time" in job
    assert "#SBATCH --job-name=mine\n" in job


ENDS = [(0, False), (143, True), (138, True), (75, True), (1, False), (2, False), (129, False), (134, False)]
ENDS = [(code, 0, again) for code, again in ENDS] + [(137, 300, False), (137, 600, True)]


@pytest.mark.parametrize(("code", "seconds", "again"), ENDS)
def test_a_slurm_job_requeues_itself_after_a_stop_a_stall_or_a_loss_that_is_not_of_its_start(
    cluster, code, seconds, again
):
    cluster("sbatch", f"{{ echo SECONDS={seconds}; cat; }} > {cluster.folder}/job")
    cluster("jaxtrain", f"exit {code}")
    cluster("srun", 'while [[ "$1" == --* ]]; do shift; done; "$@"')
    cluster("scontrol")
    call(cluster, "launch_slurm", *CONFIG)
    environment = {**os.environ, "PATH": f"{cluster.folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    done = process(["bash", cluster.folder / "job"], env=environment)
    assert done.returncode == code
    assert calls(cluster, "jaxtrain") == [["train", *CONFIG[1:]]]  # the space and the quote arrived
    assert calls(cluster, "scontrol") == ([["requeue", "77"]] if again else [])
    assert "--output=runs/logs/%x-%N.log" in calls(cluster, "srun")[0]


def test_tpu_dry_run_prints_the_commands(cluster):
    cluster("gcloud")
    arguments = ["me", "--zone", "us-east5-a", "--project", "p", *CONFIG]
    dry = call(cluster, "launch_tpu_vm", "--dry-run", *arguments)
    assert calls(cluster, "gcloud") == []
    assert not list(cluster.folder.glob("*.tgz"))
    call(cluster, "launch_tpu_vm", *arguments)
    real = calls(cluster, "gcloud")
    assert [words[3] for words in real] == ["scp", "ssh", "ssh"]
    assert all(words[-4:] == ["--zone", "us-east5-a", "--project", "p"] for words in real)
    # The printed commands do the same as a script.
    (cluster.folder / "calls" / "gcloud").unlink()
    (cluster.folder / "printed").write_text(dry)
    call(cluster, str(cluster.folder / "printed"), cwd=SCRIPTS.parent)
    assert calls(cluster, "gcloud") == real


# gcloud with a TPU VM of two hosts: folders, in which the command of `ssh` is run. They have no pip.
GCLOUD = """
verb=$4
shift 4
while [ $# -gt 0 ]; do
  case "$1" in
    --worker) worker=$2; shift ;;
    --command) command=$2; shift ;;
    --zone) shift ;;
    *) words+=("$1") ;;
  esac
  shift
done
[ "$worker" = all ] && hosts="0 1" || hosts=$worker
for host in $hosts; do
  mkdir -p FOLDER/host$host
  cd FOLDER/host$host
  if [ $verb = scp ]; then cp "${words[0]}" "${words[1]#*:}"; continue; fi
  if [[ "$command" == tail* ]]; then echo "follows $host"; continue; fi
  hostname() { echo host$host; }
  export -f hostname
  export host
  bash -c "$command" || exit 1
done
"""
# The host's Python: its venv has a pip that does nothing and a jaxtrain that sleeps until TERM.
PYTHON = """
mkdir -p $3/bin
printf '#!/usr/bin/env bash\\n' > $3/bin/python
cat > $3/bin/jaxtrain <<'END'
#!/usr/bin/env bash
trap 'echo stopped; exit 143' TERM
printf '%s|' "$@"; echo
while true; do sleep 0.05; done
END
chmod +x $3/bin/*
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="the hosts are Linux, and this is not")
def test_tpu_vm_starts_attaches_stops_and_resumes(cluster):
    cluster("gcloud", GCLOUD.replace("FOLDER", str(cluster.folder)))
    cluster("python3", PYTHON)
    hosts = [cluster.folder / name for name in ("host0", "host1")]
    logs = [host / "jaxtrain-logs" / f"{host.name}.log" for host in hosts]
    command = ["launch_tpu_vm", "me", "--zone", "z"]
    pids = set()
    try:
        for attempt in (1, 2):
            out = call(cluster, *command, *CONFIG)
            assert "host0: started\nhost1: started\nfollows 0" in out
            pids |= {int((host / "jaxtrain.pid").read_text()) for host in hosts}
            assert len(pids) == 2 * attempt
            line = "|".join(["train", *CONFIG[1:]]) + "|\n"
            wait_until(lambda n=attempt, line=line: all(log.read_text().count(line) == n for log in logs))
            assert (hosts[1] / "jaxtrain" / "pyproject.toml").is_file()
            assert not (hosts[1] / "jaxtrain" / ".git").exists()
            out = call(cluster, *command, *CONFIG)
            assert "host0: already running\nhost1: already running\nfollows 0" in out
            assert "stopping" in call(cluster, *command, "--stop")
            wait_until(lambda n=attempt: all(log.read_text().count("stopped\n") == n for log in logs))
            wait_until(lambda: call(cluster, *command, "--stop") == "host0: no run\nhost1: no run\n")
    finally:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


HOSTILE = [
    *("x;touch PWN;", "$(touch PWN)", "`touch PWN`", "x\ntouch PWN\n", "x\rtouch PWN", "x|touch PWN", "x&&touch PWN"),
    *("x' ; touch PWN ; '", 'x" ; touch PWN ; "', "x\n#SBATCH --output=PWN", "x --output=PWN", "<(touch PWN)", "x>PWN"),
    *("a[$(touch PWN)]", "\\`touch PWN\\`", "%s%n;touch PWN", "${PATH:=PWN}", "x\nEND\ntouch PWN\n"),
]


def run_hostile(cluster, script, arguments):
    """Runs a launcher with stand-ins; returns its exit code and the files that must not exist."""
    folder = cluster.folder
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(folder)}
    for dry in ([], ["--dry-run"]):
        command = ["bash", SCRIPTS / script, *dry, *arguments]
        done = process(command, env=environment, cwd=folder)
        assert "Traceback" not in done.stderr
    if script == "launch_slurm" and done.returncode == 0:
        (folder / "printed").write_text(done.stdout)
        process(["bash", folder / "printed"], env=environment, cwd=folder)
    return done.returncode, [path for path in folder.rglob("*PWN*") if path.name.startswith("PWN")]


def test_hostile_names_are_never_run(cluster):
    """Quoting in every argument of both scripts, on this machine and on the hosts."""
    hostile = [text.replace("PWN", str(cluster.folder / "PWN")) for text in HOSTILE]
    cluster("gcloud", GCLOUD.replace("FOLDER", str(cluster.folder)))
    venv = "printf '#!/bin/sh\\n' | tee $3/bin/python > $3/bin/jaxtrain"
    cluster("python3", f"mkdir -p $3/bin; {venv}; chmod +x $3/bin/*")
    cluster("sbatch", "env SLURM_JOB_ID=7 bash")
    cluster("srun", 'while [[ "$1" == --* ]]; do shift; done; "$@"')
    cluster("jaxtrain", "exit 143")
    cluster("scontrol")
    for text in hostile:
        for option in ("nodes", "gpus-per-node", "time", "partition", "account", "name"):
            assert run_hostile(cluster, "launch_slurm", [f"--{option}", text, *CONFIG]) == (2, [])
        assert run_hostile(cluster, "launch_slurm", [text, *CONFIG]) == (2, [])
        assert run_hostile(cluster, "launch_slurm", ["--", text]) == (0, [])  # which names the job
        assert run_hostile(cluster, "launch_tpu_vm", [text, "--zone", "z", *CONFIG]) == (2, [])
        assert run_hostile(cluster, "launch_tpu_vm", [text, "--zone", "z", "--stop"]) == (2, [])
        assert run_hostile(cluster, "launch_tpu_vm", ["me", "--zone", text, "--stop"]) == (2, [])
        assert run_hostile(cluster, "launch_tpu_vm", ["me", "--zone", "z", "--project", text, "--stop"]) == (2, [])
    for script, arguments in (("launch_slurm", []), ("launch_tpu_vm", ["me", "--zone", "z"])):
        assert run_hostile(cluster, script, [*arguments, "--", *hostile]) == (0, [])
    assert ["train", *hostile] in calls(cluster, "jaxtrain")


@pytest.mark.parametrize("script", ["launch_tpu_vm", "launch_slurm"])
def test_the_scripts_are_sound_bash(script):
    assert os.access(SCRIPTS / script, os.X_OK)
    run(["bash", "-n", SCRIPTS / script])
    if shellcheck := shutil.which("shellcheck"):
        run([shellcheck, SCRIPTS / script])
