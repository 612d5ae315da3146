"""Print the oldest versions of transformers, PEFT and TRL that the installed qlora_ext takes, as pip wants them."""

from importlib.metadata import requires

from packaging.requirements import Requirement

NAMES = ("transformers", "peft", "trl")
found = {
    r.name: r
    for r in map(Requirement, requires("qlora-ext") or ())
    if r.marker and r.marker.evaluate({"extra": "train"})
}
for name in NAMES:
    (oldest,) = [each.version for each in found[name].specifier if each.operator == ">="]
    print(f"{name}=={oldest}")
