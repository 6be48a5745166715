"""Help texts: one short page per command, printed without importing torch."""

TOP_HELP = """\
usage: {0} COMMAND [--config NAME ...] [--key=value ...]

  fit        train a model            {0} fit --config shakespeare/quick
  validate   measure a checkpoint     {0} validate --ckpt_path=FILE
  test       measure on the test data {0} test --ckpt_path=FILE
  predict    apply it to new data     {0} predict --ckpt_path=FILE
  estimate   memory and time, before  {0} estimate --config gpt2/124m --gpu h200
  generate   sample texts or images   {0} generate --ckpt_path=FILE --prompt=TEXT
  export     save for other programs  {0} export --ckpt_path=FILE --folder=NAME
  list       configs, classes, names  {0} list configs
  show       one of them, in full     {0} show EMA
  new        a file to start from     {0} new task MyTask
  completion for bash or zsh          {0} completion bash
  runs       list, compare, clean     {0} runs; {0} runs compare A B

{0} COMMAND --help shows the arguments of a command; {0} --version shows the versions.
"""

FIT_HELP = """\
usage: {0} fit --config NAME [--config OVERLAY ...] [--key=value ...]

  --config shakespeare/quick  a preset ({0} list configs) or your YAML file; the last wins
  --model=NAME --data=NAME    the classes of task and data; a class of yours is my_file.MyTask
  --model.KEY=V --data.KEY=V --trainer.max_steps=200      arguments of them, and of the Trainer
  --optimizer=SGD --optimizer.lr=0.01 --schedule.warmup=0.1    the optimizer and its schedule
  --trainer.callbacks+=EMA --trainer.callbacks.EMA.decay=0.9    add a callback; set its argument
  --ckpt_path=auto            resume from the newest complete checkpoint; or a file; spam/quick/3
  --trust=PACKAGE, --debug    import classes that only the checkpoint names; show tracebacks
  --print_config, --help=all  show the config; show every argument (of a class: --model.help=NAME)
"""

EVALUATE_HELP = """\
usage: {0} {1} --ckpt_path=FILE [--config NAME ...] [--key=value ...]

  {2}
  --ckpt_path=FILE            a checkpoint, with its model and data; or last; best; spam/quick/3
  --data.KEY=V                {3}
  --config NAME               a preset or a YAML file, for values that the checkpoint lacks
  --trainer.devices=2         any argument of Lightning's Trainer
  --trust=PACKAGE             import classes of other packages that the checkpoint names
  --print_config, --debug     show the config; show tracebacks
  --help=all                  show every argument; of a class: --data.help=NAME
"""

ESTIMATE_HELP = """\
usage: {0} estimate --config NAME [any flag of fit] [--gpu=NAME] [--devices=N] [--json]

  Parameters, FLOPs, memory, communication and time of a run, without a GPU and without training.
  --gpu=h200                  a GPU by name; or --gpu_memory=80 (GiB) --gpu_tflops=312 (16 bits)
  --devices=8 --num_nodes=2   the ranks; --link=nvlink or ib400 between them
  --price_per_hour=3 --watts=700   of a device: price and energy of the run
  --quick, --full             simulate no step; or all blocks, also where equal ones are many
  --measure                   run real steps on this machine, for code that needs values
  --json                      JSON instead of tables
  every other argument        as for fit: {0} fit --help
"""

GENERATE_HELP = """\
usage: {0} generate --ckpt_path=FILE [--prompt=TEXT | --labels=0-9] [--key=value ...]

  --ckpt_path=FILE            a trained model; or auto; or last (of --trainer.name=NAME)
  texts:  --prompt=TEXT       may be repeated; \\n is a line break; or --prompt_file=FILE
    --max_new_tokens=200 --temperature=0.8 --top_k=40 --top_p=0.9 --min_p=0.05
    --stop=TEXT --context_overflow=slide    end of a text; beyond the context: slide or error
  images:  --labels=0-4,7     the classes, one row each; saved in --file=samples.png
    --guidance_scale=0.5 --num_steps=20 --sampler=ddim --eta=0 --folder=NAME (one file each)
  both:  --num_samples=8 --seed=0 --batch_size=64 --device=cpu --trust=PACKAGE
"""

EXPORT_HELP = """\
usage: {0} export --ckpt_path=FILE --folder=NAME [--format=NAME | --merge | --quantize=NAME]

  --ckpt_path=FILE            a trained model; or auto; or last (of --trainer.name=NAME)
  --folder=NAME               the output folder; files with the same names are replaced
  --format=gpt2               language: model.safetensors and config.json for transformers
  --format=safetensors        images: model.safetensors and config.json
  --merge                     the model with its adapters merged: model.ckpt, which needs no
                              callback, and model.safetensors
  --quantize=int8             the same in 8 bits per weight; nf4: in 4 bits
  --consolidate=FILE.ckpt     instead: a sharded checkpoint as one file, for any strategy
"""

LIST_HELP = """\
usage: {0} list [KIND] [WORD]

  {0} list                 the kinds: configs, callbacks, optimizers, strategies, tasks,
                                 data, rewards, samplers, schedules
  {0} list configs         the names of a kind, with machine, time and expected result
  {0} list callbacks lora  the names of a kind that contain a word, or whose text does
  {0} list muon            the names of all kinds that contain a word
"""

SHOW_HELP = """\
usage: {0} show NAME [NAME ...]

  {0} show shakespeare/quick           a config with all its values, defaults included
  {0} show gpt2/124m strategy/zero3    several configs together, in order
  {0} show EMA                         a class: what it does, its arguments, a command
  {0} show mine.SignDescent            a class of yours, in mine.py of this folder
"""

NEW_HELP = """\
usage: {0} new task|optimizer|callback|reward NAME

  {0} new task Planets       writes planets.py with a model and its data; no file is replaced
  {0} new optimizer mine.SignDescent    the class SignDescent in mine.py
The file works as it is: the command to run it is printed and stands at its top.
"""

COMPLETION_HELP = """\
usage: {0} completion bash|zsh

  bash: add to ~/.bashrc     eval "$({0} completion bash)"
  zsh: add to ~/.zshrc       eval "$({0} completion zsh)"
The Tab key then completes commands, configs, flags, class names and their values.
"""

RUNS_HELP = """\
usage: {0} runs [show | compare | clean WHAT] [NAME ...] [--key=value ...]

  runs shakespeare            list the runs whose names begin so; without a name, all
    --task=NAME --status=done --best=..0.5 --steps=100.. --time=10m..2h --size=1GB..
    --sort=best --limit=20 --json        status: running, done, failed, interrupted, killed
  runs show NAME              command, commit, versions, machine, metrics of a run
  runs compare A B            what differs; curves.png, comparison.html: --metrics= --folder=
  runs clean WHAT             checkpoints (never a newest or best), evaluations, events, failed;
    --yes                     deletes what is shown without it; filters as above
  NAME: a path, task/config/3, the beginning of one name, or last; --root=runs is their folder
"""

COMMAND_DESCRIPTIONS = {
    "validate": "Measure a model on the validation data.",
    "test": "Measure a model on the test data, which training does not use.",
    "predict": "Apply a model to new data and save its predictions.",
}
DATA_DESCRIPTIONS = {"predict": "the input; for the spam classifier --data.predict_path=FILE"}

COMMAND_HELP = {
    "fit": FIT_HELP,
    "estimate": ESTIMATE_HELP,
    "generate": GENERATE_HELP,
    "export": EXPORT_HELP,
    "list": LIST_HELP,
    "show": SHOW_HELP,
    "new": NEW_HELP,
    "completion": COMPLETION_HELP,
    "runs": RUNS_HELP,
}


def help_text(command: str | None, program: str) -> str:
    """Return the help page of ``command``, or of the program, with ``program`` as its name."""
    if command is None:
        return TOP_HELP.format(program)
    if command in COMMAND_HELP:
        return COMMAND_HELP[command].format(program)
    data = DATA_DESCRIPTIONS.get(command, "other data than in training")
    return EVALUATE_HELP.format(program, command, COMMAND_DESCRIPTIONS[command], data)


def version_text() -> str:
    """Return the versions for a bug report, and a warning if `lightning` is another program."""
    import platform
    from importlib.metadata import version as package_version

    library_versions = ", ".join(
        f"{name} {package_version(name)}" for name in ("torch", "lightning")
    )
    python_version = platform.python_version()
    line = f"ravine {package_version('ravine')} ({library_versions}, Python {python_version})\n"
    return line + shadowed_command_warning()


def shadowed_command_warning() -> str:
    """Return a warning if another package owns `lightning` on the PATH, else ""."""
    import shutil
    from pathlib import Path

    program_path = shutil.which("lightning")
    if program_path is None or b"ravine" in Path(program_path).read_bytes():
        return ""
    return f"warning: {program_path} is another program (lightning-sdk installs one): use ravine\n"
