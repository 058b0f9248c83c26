"""A folder of pictures to try edm2 on: the emoji of the npm package `emoji-datasource-twitter`, in classes.

npm pack emoji-datasource-twitter
python examples/emoji_folder.py emoji-datasource-twitter-*.tgz emoji
edm2 data convert emoji --out emoji.zip --size 32 --background white
edm2 train --data emoji.zip --out runs/emoji

The package holds about 1,900 pictures of 64x64 pixels with transparent corners; symbols, which are mostly text in
boxes, are left out. The pictures are Twitter's, licensed CC BY 4.0.
"""

import argparse
import json
import tarfile
from pathlib import Path

CLASSES = {
    "Smileys & Emotion": "faces",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Flags": "flags",
}


def make_folder(package: Path, out: Path) -> dict[str, int]:
    """Copy the pictures of the package's archive into one folder a class; returns the number of each class."""
    counts = dict.fromkeys(CLASSES.values(), 0)
    with tarfile.open(package) as archive:
        table = archive.extractfile("package/emoji.json")
        assert table is not None
        for emoji in json.load(table):
            name = CLASSES.get(emoji["category"])
            if name is None or not emoji["has_img_twitter"]:
                continue
            picture = archive.extractfile(f"package/img/twitter/64/{emoji['image']}")
            assert picture is not None
            # The short name, because it says what the picture shows; the code point makes it unique.
            path = out / name / f"{emoji['short_name']}-{Path(emoji['image']).name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture.read())
            counts[name] += 1
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path, help="the archive that `npm pack` wrote")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args()
    for name, count in make_folder(args.package, args.out).items():
        print(f"{name:<12}{count}")
