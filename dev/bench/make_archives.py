"""Repacks a .pt in torch's zip container, written by convert, with nothing but the standard library.

    make_archives.py MODEL.pt FOLDER

FOLDER gets legacy.pt, the container of torch before 1.6; stored.zip and deflated.zip hold it as NVIDIA ships it.
"""

import pickle
import sys
import zipfile

source, folder = sys.argv[1:]
legacy = folder + "/legacy.pt"
with zipfile.ZipFile(source) as pt, open(legacy, "wb") as out:
    # A legacy storage's id has a sixth item, the view, which is None.
    program = pt.read("archive/data.pkl").replace(b"tQ", b"NtQ")
    sizes = {"short": 2, "int": 4, "long": 4}
    for fact in 0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": sizes}:
        pickle.dump(fact, out, protocol=2)
    out.write(program)
    keys = sorted(name.rsplit("/", 1)[1] for name in pt.namelist() if "/data/" in name)
    pickle.dump(keys, out, protocol=2)
    for key in keys:
        data = pt.read("archive/data/" + key)
        out.write((len(data) // 2).to_bytes(8, "little") + data)  # fp16

for name, method in ("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile("%s/%s.zip" % (folder, name), "w", method) as archive:
        archive.writestr("latest_checkpointed_iteration.txt", "release")
        archive.write(legacy, "release/mp_rank_00/model_optim_rng.pt")
