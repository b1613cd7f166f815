"""Dependent quantization: paths stay in the trellis, cost less error at equal bytes, and come back bit for bit."""

import base64
import dataclasses
import hashlib
import math
import random

import numpy as np
import pytest
import torch
from test_artifact import fuzz_one, trained_stand_in, weights
from test_quantizer import output_error, second_moments

import train_gpt as tg


def walk(codes: np.ndarray, states: int) -> np.ndarray:
    """States (R, C + 1) that codes lead through; asserts that each code has its state's parity."""
    path = [np.zeros(len(codes), np.int64)]
    for column in codes.T.astype(np.int64):
        assert np.array_equal(column & 1, tg.trellis_bits(states)[0][path[-1]])
        path.append(tg.next_state(path[-1], column, states))
    return np.stack(path, axis=1)


def random_paths(shape: tuple[int, int], states: int, spread: float, seed: int = 0) -> np.ndarray:
    """Random codes of the right parities."""
    rng, codes, state = np.random.default_rng(seed), np.zeros(shape, np.int16), np.zeros(shape[0], np.int64)
    for j in range(shape[1]):
        odd = tg.trellis_bits(states)[0][state].astype(np.int64)
        codes[:, j] = (2 * np.round((rng.normal(size=shape[0]) * spread - odd) / 2) + odd).clip(-2046, 2046 - odd)
        state = tg.next_state(state, codes[:, j].astype(np.int64), states)
    return codes


# Subset (code mod 4) -> next state, written out: the published tables up to the names of their states.
TABLES = {
    4: [{0: 0, 2: 1}, {1: 2, 3: 3}, {0: 1, 2: 0}, {1: 3, 3: 2}],
    8: [{0: 0, 2: 1}, {1: 2, 3: 3}, {2: 4, 0: 5}, {3: 6, 1: 7}, {2: 0, 0: 1}, {3: 2, 1: 3}, {0: 4, 2: 5}, {1: 6, 3: 7}],
}


@pytest.mark.parametrize("states", [4, 8])
def test_the_state_machine_is_the_published_trellis(states):
    for state, moves in enumerate(TABLES[states]):
        for code in range(-127, 128):
            if code % 2 == tg.trellis_bits(states)[0][state]:
                assert tg.next_state(state, code, states) == moves[code % 4], (state, code)


@pytest.mark.parametrize("states", list(tg.TRELLISES))
def test_the_search_finds_the_path_of_least_cost(states):
    """Without compensation nothing is dropped: the cost is that of the best of all paths."""
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(states)) * 2
    codes = tg.trellis_codes(x[None], None, states)[0]
    walk(codes.numpy(), states)
    power_C = x.square().mean(0) + 0.1
    power_R = (x.square() / power_C).mean(1) + 0.1
    price = tg.RATE_PRICE / (2 * math.log(2)) / (power_C * power_R[:, None])
    cost = (x - codes).square() + price * codes.float().square()
    for r in range(len(x)):
        least = {0: 0.0}
        for j, target in enumerate(x[r].tolist()):
            after: dict[int, float] = {}
            for state, spent in least.items():
                for code in range(-13 if tg.trellis_bits(states)[0][state] else -12, 14, 2):
                    to = tg.next_state(state, code, states)
                    after[to] = min(
                        after.get(to, math.inf), spent + (target - code) ** 2 + float(price[r, j]) * code**2
                    )
            least = after
        assert float(cost[r].sum()) == pytest.approx(min(least.values()), rel=1e-4)


def rate_by_parity(codes: torch.Tensor) -> float:
    """Bits a code under its frequencies within its parity."""
    values = codes.numpy().astype(int).ravel() + 128
    counts = np.bincount(values, minlength=256)
    return sum(tg.entropy_bits(counts[p::2]) for p in (0, 1)) / values.size


@pytest.mark.parametrize(("states", "gap"), [(4, 0.62), (8, 0.53), (64, 0.37)])
@pytest.mark.parametrize("spread", [1.0, 2.0, 4.0])
def test_a_gaussian_source_is_coded_near_its_bound(states, gap, spread):
    """In dB above the rate-distortion bound; independent codes lie 1.5 dB above it."""
    x = torch.randn(1, 300, 400, generator=torch.Generator().manual_seed(1)) * spread
    codes = tg.trellis_codes(x, None, states)
    error = float((x - codes).square().mean()) / spread**2
    assert 10 * math.log10(error) + 20 * math.log10(2) * rate_by_parity(codes) < gap + (0.15 if spread == 1 else 0)


@pytest.mark.parametrize(("states", "gain"), [(4, 0.8), (8, 0.9), (64, 1.04)])
def test_compensation_inside_the_search_beats_gptq_at_equal_rate(states, gain):
    """Correlated inputs: at least `gain` dB below GPTQ in its best order, and below the search without it."""
    w, h = torch.randn(192, 160, generator=torch.Generator().manual_seed(0)), second_moments(0.7, 160)
    spread = tg.error_spread(h, 0.01, "cholesky")
    columns = tg.column_steps(spread.weight_C)
    step = tg.octave_eighths(columns) * 0.25
    codes = tg.trellis_codes((w / step)[None], [spread.in_steps(columns)], states)[0]
    walk(codes.numpy(), states)
    error = lambda codes, step: output_error(w, codes * step, torch.ones(192), h)  # noqa: E731
    at_rate = lambda e, rate: 10 * math.log10(e) + 20 * math.log10(2) * rate  # noqa: E731
    uniform = tg.gptq(w[None], h[None], torch.full((1, 192), 0.5), 127)[0]
    rate = tg.entropy_bits(np.bincount(uniform.numpy().astype(int).ravel() + 128)) / uniform.numel()
    found = at_rate(error(codes, step), rate_by_parity(codes))
    assert found < at_rate(error(uniform, 0.5), rate) - gain
    alone = tg.trellis_codes((w / 0.25)[None], None, states)[0]
    assert found < at_rate(error(alone, torch.full((160,), 0.25)), rate_by_parity(alone)) - 1


def test_steps_of_columns_make_every_column_cost_the_same():
    spread = tg.error_spread(second_moments(1.0, 48), 0.01, "cholesky")
    even = spread.in_steps(tg.column_steps(spread.weight_C))
    assert spread.weight_C.max() / spread.weight_C.min() > 4 and even.weight_C.max() / even.weight_C.min() < 1.4
    assert even.gain < spread.gain and float(even.weight_C.mean()) == pytest.approx(1)
    assert torch.equal(even.moves_CC.diagonal(), torch.ones(48))


def test_dead_inputs_do_not_disturb_the_others():
    h = second_moments(0.5, 40)
    h[[3, 17]] = 0
    h[:, [3, 17]] = 0
    w, spread = torch.randn(64, 40), tg.error_spread(h, 0.01, "cholesky")
    assert torch.isfinite(spread.moves_CC).all() and torch.isfinite(spread.weight_C).all()
    alive = [j for j in range(40) if j not in (3, 17)]
    columns = tg.column_steps(spread.weight_C)
    step = tg.octave_eighths(columns) * 0.3
    codes = tg.trellis_codes((w.index_fill(1, torch.tensor([3, 17]), 0) / step)[None], [spread.in_steps(columns)], 8)[0]
    walk(codes.numpy(), 8)
    assert output_error(w, codes * step, torch.ones(64), h) < 0.05
    assert output_error(w[:, alive], (codes * step)[:, alive], torch.ones(64), h[alive][:, alive]) < 0.05


def test_search_in_parts_and_in_threads_gives_the_same_codes(monkeypatch):
    named = {f"b.{i}.weight": torch.randn(rows, 24) for i, rows in enumerate((40, 40, 40, 33))}
    store, cfg = dict.fromkeys(named, "mlp"), tg.Config(quant_trellis=4, quant_min_numel=0)
    hessians = {"b.1": second_moments(0.5, 24)}
    whole = tg.quantize(cfg, named, store, hessians)
    monkeypatch.setattr(tg, "SURVIVORS_AT_ONCE", {"cpu": 16 * 4})
    for name, item in tg.quantize(cfg, named, store, hessians).items():
        assert torch.equal(item.codes, whole[name].codes) and item.trellis == 4
        assert (item.columns is not None) == (name == "b.1.weight")


@pytest.mark.parametrize("states", [4, 8])
def test_any_paths_survive_the_coder(states):
    shapes = [(16, 1), (90, 70), (17, 300), (64, 40)]
    arrays = [
        random_paths(s, states, spread, i) for i, (s, spread) in enumerate(zip(shapes, (1, 5, 0.3, 600), strict=True))
    ]
    arrays.append(tg.trellis_codes((torch.randn(200, 4) @ torch.randn(4, 48) * 8)[None], None, states)[0].numpy())
    stream = tg.encode_paths(arrays, states, predictable=True)
    found = tg.decode_paths(stream, [a.shape for a in arrays], states)
    assert all(np.array_equal(a, b) and b.dtype == np.int16 for a, b in zip(arrays, found, strict=True))
    alone = tg.encode_paths(arrays[-1:], states, predictable=True)
    assert len(alone) < 0.9 * len(tg.encode_paths(arrays[-1:], states))  # prediction and trellis go together


def test_codes_off_the_trellis_are_no_stream():
    with pytest.raises(AssertionError, match="leave the trellis"):
        tg.encode_paths([np.ones((16, 8), np.int8)], 8)


def test_a_trellis_saves_error_at_equal_bytes_in_the_whole_quantizer():
    """Real bytes of the packed file: at 3.5 bits at least 0.9 dB less error, all tensors together."""
    g = torch.Generator().manual_seed(2)
    named = {f"blocks.{i}.mlp.up.weight": torch.randn(256, 96, generator=g) * 0.02 for i in range(2)}
    store, h = dict.fromkeys(named, "mlp"), second_moments(0.6, 96)
    hessians, fisher = {f"blocks.{i}.mlp.up": h for i in range(2)}, {n: torch.ones(256) for n in named}

    def error(states: int) -> float:
        cfg = tg.Config(target_bytes=2 * 256 * 96 * 7 // 16, quant_trellis=states, gptq_enabled=True)
        budget = tg.fill_budget(cfg, {}, named, store, tg.Calibration(hessians, fisher), 0)
        assert 0.995 * cfg.target_bytes <= budget.spent <= cfg.target_bytes
        _, stored = tg.unpack(budget.blob)
        assert all(s.trellis == states for s in stored.values())
        return sum(float(((e := tg.dequantize(s) - named[n]) @ h * e).sum()) for n, s in stored.items())

    uniform = error(0)
    assert 10 * math.log10(error(8) / uniform) < -0.9
    assert 10 * math.log10(error(4) / uniform) < -0.8


def test_fine_steps_of_rows_columns_and_trellis_multiply():
    """A frequent token's row at a high rate: 8 bits would widen its step, which cost more than the trellis saves."""
    g = torch.Generator().manual_seed(6)
    named, h = {"tok_emb.weight": torch.randn(1200, 48, generator=g)}, second_moments(1.0, 48)
    calibration = tg.Calibration({"tok_emb": h}, {"tok_emb.weight": 1 / torch.arange(1, 1201)})

    def loss(states: int) -> float:
        cfg = tg.Config(target_bytes=1200 * 48 * 6 // 8, quant_trellis=states, gptq_enabled=True)
        budget = tg.fill_budget(cfg, {}, named, {"tok_emb.weight": "embed"}, calibration, 0)
        item = tg.unpack(budget.blob)[1]["tok_emb.weight"]
        error = tg.dequantize(item) - named["tok_emb.weight"]
        assert (item.codes.abs().max() > 127) == (states > 0)
        return float(calibration.fisher["tok_emb.weight"] @ (error @ h * error).sum(1))

    assert 10 * math.log10(loss(8) / loss(0)) < -0.9


# ---- files of version 2 and 3

VERSION_2 = base64.b85decode(
    "P)AHn0ss#V00000000sJ0018X007_u9svqn06mC^XEX(yvdk@FH;>(tWhyRQhTN1LI<4}i-95OD$pZ=2{q^urxWxB*3;PHSH#A<KX(KpEGUR"
    ";Xu08L6(#ch;8@ihqbbWkiF91+`aEq-np;|yb{+MU=4~b#aRvi2#+eq8*y%mM;mxu81RhXpx7+dn}KjMT+8ep{peHtY@UUT=tEP6}s%tW|lZ"
    "gD9&EbvP4OX=(s)JzkQz}aMFXGH)8&S7Co6Fe!JmV#IVm5cwbpI|$^4tW*k2)W!Nt(d7Cdv)oy*OM|W#EJqLvqNdE{sgbEgh><+x1;95h9Ll"
    "r?)=;|Im364tYO|722GB;jZObYoKWTBGWb`8e(!I+CQ1MRCjbBdH~;_u-~dekFkJuu1yUyUF>`%v?pYfWkjaXRw8qkI02+EmMNyfA?7e3k;r"
    "Y}jHD2z~3lyh#N8Mlm#-lM8k3y9*|I_Zi5BWZ<6*>4DbE{WXeEd!R)=C$J{s`g=6;aa!avsm}vqfku)bxB6o_(W^pWcCCDEt_Uum0o%8s$Bm"
    "$M8;unW-awQaX)RX2~yz&f{(BWx=4bFJ6zk9l-DX?QOug-aj?K0+@L&_?mR&wb(L`15c~_Y?L8ISo*C0K+hT<?{w*&bg&kZZ%GoW87N7a000"
    "00-~cB85nTWPZUAfxdc>pclDPeH=eR%s0N?;G01#aO0B#6t>w3ha?UK6D-1Yzf00964&CE<a0BZmM0EPen0N?=C0DfHn0tJ$Nk5`Uc4Z91a%"
    "IxVY1;t3z*D{}m^gp1{F)NPDgNWBpUxwQL8+y#;sTr&!a(Sk?b3_Z8disq;0xyW+ZNO@%si<g9R&~vO_b#cOos`wZ6uczo6F;+T=w4At5y<a"
    "pgcOEckyHxTiQB@x)Io%B&qgL;I{RkAo0<SzvenT(UF}nq-$1mb!1^?G`&5=SY-d4_(#`|bVCou#+u-9RkZMFcIgEt!<;_Ji5prp&%R^&9pT"
    "g4`<x6f>wO&3a&+W!~6(`K}6H97Wcm{Y?RDIv1<XX3lx#VZ>KyvbDZu8J2vDR-9B@FVRWqH`Fe?M7p9Npi=01%%w>@Gt_<WGpQsZC2OZR7j7"
    "A*1*v@()Wb3V6~@c<z0KaOV2@pyRU%gvBQxB5{P7>_<N0B<;Mz5~o#l07UU4AgM&Mz+aP`+Ze2!1BhPGRoXtm9`bBXnKYlWXf**zgD30hk0I"
    "t9+08LKP^P4r)KWP&9((5g-r7F-DAPVn<#4%~cQqrradHG`-gK1rmePE4ktwcrW(?s+dfK=6aO<H6+3dsXdW&MIu60i=^3}F20JqOR?Nn04A"
    ">@DMM7TFQ=1ev-v{SQYpuv>jE|fkC+;9d5Dxq`%A~YTYG1Q~_iAXJGq6E<nM$oWo_<^SAOYLmqR&Zj34Q=DAnmJgOGo#Wql-9SuK*OB_nW8X"
    "F=i>YErojP&Gketq9;5@AsSVtN@yu}j^z2peIp_H?*Y;EpJl#PKv;j}XS^B<N(frv976NgiKRYwl;5a}Bh@hF^45s*srFm3za)5q~1abIvx0"
    "SV7(;KmOm%2(5AT8pw35l0R|32HC^2NQWQA5##aQC@^OsD4+g8c5zXXuna#rf0A3$d``i>iduSHI`{3+AVd*oGG*KnSZYMI!WZi0Jv}3fqAv"
    "$OxLB`P}ArHY^)RRN1VaUimB|z;nJUv*`1z{Drc`)p5nkCgz}Sfh5AhRwPCOZGV@_m#|`#4PS^+1dJ)MEP$UTgf(8uA8im=2~>9vV-oC4KlL"
    "yNfP@o76HQ`LLypY=s}bhysoCs*a6FCrG7NbadQlSrwThJ55r4H0PX16wP|WKi!j;3LfXmJS3Ui9cnAs?^zJj{x=mpB@1qX$5fX){2uYjRPt"
    ")X{-u@i}+3Q4(HheUa|0vAp|^_~wZ_>ZnvYz9T19wd02G5cqpd1?p6M~R!N9cu2BPWPdEKa=9@^L*Z&9^!|nxSddz7ndVJt1y%wp0<vp2O<^"
    "V+uggEQ%b%*>H3H3hr;BR3`k*tQo$sx07$3?cD!itY>#cwkT4XK-$%eJW%16M%L7N`y^;O8v0bn$VY=<%9l%$K^X76#j<*BKoye10c{*b&)!"
    "{$;2V<NiD9{UpSn2I#$(yAOgD6P(Cm__CwOyb5ze5o#mt{Dh)nB7$%9@vHfNCT?;iPBCn(mdO&jxfCKI-JyrP4RrO2-aGW8fJhsSUQ9$7l~*"
    "7ha4DpeVM6@Mk~G97zf-Ay`doZ%a!f-~TF~j#ZMP=CO99`+X(Q@0(WN^h8ca%wAHtE^ak1slv3@lzX(|bWs+&UvlvE`ZlTCkzqo7s`%>`MQc"
    "O?>hI-PC?w;V*tr8W<<t|g_F`ud*Ccq0HnVk`Ek*p207o%S%KIybX0wxe-V-Jnx6`JFhFSeq%OE9Oi!pJ|44H5@H3Z}jW_gv>`<bB!_qD?B{"
    "hp)HRJIEX^n_H`4$Ia+X%}%Gi$8S59Qus5&x>DZ0i1_^{OQ*+ai6?fugSZ!{zdTHtjZD>U@fMXId!*C6vs9s-uwqc64@36e5pq@=@gz9bTUm"
    "r=Pv)L@K!gSHLTLSsPZrnDD{+^)>;w%wc<^~h^rM}5Q6Sa4e3J?LKEHEENNMZrU^+Rj)ti-qT!w-eZ?C>v04Wh!ICW_O~HC1I@OJK9EpH~BO"
    "js!K361gZIk1tZU!H7tsSSNH(J%Mre>O+-aWLRV6d)?h0W52nV_9k=oOkf#B~0P+kaCsKKvzt2s;q*T?E|B41s}elPDJ{(PS0MFA8HodFRN*"
    "fk*35B%Q6pssT1{S)$fE1Q;n1;2Mmu8w4sf6@sE?sl`6rYxsoY1+y}ZJ3`)sreJ6bRuJQP`3_V=OYuPDVW}$3EXr!)3t1Q<D$;wXp7~Xhc9Q"
    "P5Ng)e(V!2YgfTVfm_=9z^wR*6FORF8xw!j?M73P%JuoN8*J<Az2l~!_l>;*Q$oDT%Ga$0s5)O}Vlp0Lz+_lQ;joW`lw#$=W&3L3xbgZLcD9"
    "d8N4rL-}6bONIkjlqL*T>FjRy-VQuPPp?r;xuqbf|(ZjZ-T=`$se_FUvayTTHPbCNGD^-TUU#QJ4&bp2=d(bU>)~DMS>0VDhN8<7?+>0x5Wy"
    "3rOS{~N>kCMj-}zMubsnQkc$Blbk!3@3lz<R*ER!zdfQAjkPvmt$!4Rq08MstAGPl=L>|I7l1WB%OKWE91B=H%FkS2k_C5APb4GJ`qP35#i`"
    "=d1QS=g<)|}Yy<q02(WJP1_CE<=ScWh|k@C5Nb2Ur9~WzL3NzA;xSq=gvNx3D1h%xpf4vsVr4RK&!1s@ZkN+&Wp{cPW<|a$tM&J|CT>;^~p$"
    ")l_h5uF)ZFPSD`XMh44-TKi9ERg=AX=rU75`7VX<VYF!a=Qwzb7808f4wdbM@_ZR9MPh-fE4M#pr+w4OaxD~T{X)ucs+2k&=$f(&Soksrd0K"
    "3UDvlE(8o3r6a7RP$9WO(|H!1ztr20*UJHzKyGwdKIhw|zONe?b|Z*{M!WEw$H<HJ1K5q1!=Y~7u>8y7**`DbZf*zG?r8UQnMpi?xgO-sk+6"
    "Wm<0xanCEpY+37gYUGW{whSiK&!92PpgHKx@1Scu)94@9D!m8|K*&I!WpZx<54fM-_G;@(B9wLJ4*8Am#F)IbaZ$2voJL12L{JBH8Ek;i`2%"
    "k22IbQ8fZeciz&K-KbU^YizxofhuT!dA*y7eu=Gx!*>3*PSB6~4iRB8g<IB0DUnf(Q7O7cPVB<gcwF1+UJX_A7V9q;tM#-_jv<Yc7P_Y`QP|"
    "F7!a|DrnWz_ShR2k8kB7>$!ZvT(oTq6XIvfT*io$({L-kH`+E%ObQI|L#C!br$dCCtx*Glx2bPIH$^tG>Pn!m*s40biUFXr>z;M8@FY_siVG"
    "GRP$E66ad6Y}hk67aafrMX0~5NG-n_>q|j{kpTPA*p`Bk?4<c?^Y%!H+#|R;aly^y+YeJc&Quj$reI&sjo;y#YTB!2fBi>_cHfj8>ltvkW)="
    "(iQbx(?+Nt=m8ZVSF-Ez7?Iqy01wnb*>YBxOWOj{+(2ef#rY0UU<<7*--3VP}Shvh+)_GsT$eWcH9+s>0$(G{uApp<n`B_>tUgB;o(v?Mt^c"
    "qm?ncU0qH0pYC*90#ShRJ_Zc4MmhoIeg(`2Da)6cBj<ecEdh=u)Yb>EYu*bBf_9a)&ZK#HGpIn0;10!mj=6`(+-^B<gZ>U$|TdbbCBkp_iC6"
    "18>1Do2qwg<O!x`}Fs%HiW0CNhab>Ry(sv->0Y3l`T>t=Y7-y?`#G~z!yWk??zyJUm0000f0002s05bp~T>t<E>Kh^h@j5R_ua&#<+jNOG$i"
    "g}tmC9vNQD#Uq8>|2Teor?B2R*OB81Gp`LNIrV7&{+q4o4smw>YNIBtI0T_^8Zvf3%6%no{y~p6BhFnYYwNbJyCo<^-?U`-OWifUv2BQ!7L#"
    "^f0;FyOcV*k3-p-gN#(_boFlbS9R>TjXd3Zs1m@!y693HCthq>dm9IteZ?KR9>wJDdRY`S!*uT(Ss0V*2|flyDRih&-~bl@4_yENY(mj*SdZ"
    "rBvTq&p000000RjUA1qKHQ2?`4g4Gs@_K$Hcq$GozO*`Bsxop1w}u%Ih-+;G$A(eBh>_`h!"
)
VERSION_2_PARTS = "571e7f523efe094b3a2af92acf866305ba73c8bca8cdc6fceeaface567f126cd"


def test_files_of_version_2_still_load():
    """Made by the last script of version 2: a predicted embedding, a low-rank correction, floats and a section."""
    header, stored = tg.unpack(VERSION_2)
    assert header == {"config": {"MODEL_DIM": 24}} and tg.read_section(VERSION_2, "exact") == bytes(range(16))
    assert {n: (s.bits, s.shape) for n, s in stored.items()} == {
        "tok_emb.weight": (8, (160, 32)), "blocks.0.attn.q.weight": (5, (16, 24)), "blocks.0.mlp.up.weight": (6, (12, 24)),
        "blocks.0.attn_scale": (16, (24,)), "bigram.scale": (32, ()),
    }  # fmt: skip
    parts = b"".join(part.numpy().tobytes() for s in stored.values() for part in tg.parts_of(s))
    assert hashlib.sha256(parts).hexdigest() == VERSION_2_PARTS
    again = tg.pack(tg.Config(), header, stored, {"exact": bytes(range(16))})  # what was not new has not changed
    assert again[4:6] == b"\3\0" and again[6:-32] == VERSION_2[6:-32]


VERSION_3 = base64.b85decode(
    "P)AHn0{~JC00000001Nb002t@007_uN&y^Q06mC^XEX(yvdk@FH;>(tWhyRQhTN1LI<4}i-95OD$pZ=2{q^urxWzkOX1QRW!n+H~Z<%!m*Aa%w#T"
    "ES=%HA6ohui(jOt1QfU<0>)4pOutsdkMx4CugTH24maE`$%>57z{&_MgH#Z&6d%ra9HEsyc)uv>><T1?Ce;m<mD$5vK%Vk(ei1&}&lF4R0Z4?e{i"
    "OhsVc6iSt!oTv5CJqoK=08N&r_ntz@vNkYr|(G%)3G}na<VF<d~zP4yjh8{FTo3-6q;Ms^~LPThDW8SrVhm-Afb_FS4NUYoR`-q(bY54FLCkaijp"
    "dy?jVBGsTE|-YL$b=gvex(ZA*_%+Z_XG`Pn#j3qQ#~0THOhDj24@940012T001li007_sIRGSG000Ma7a{}kIxk8I0PxY)Zd|u=<mUXoI5qoZi|?"
    "aZ-Wako001I(h3eq0xm;9abGr*!0Hy%|A1+>HmPz~1MsRz_vhz3h;x#rmGBY<cI5;&mH#aslGXOLI002z@007_sX8=WA000Ea$R9Dxh?u_zW+7?V"
    "oPSjqw;9?+sui7r@=hB3;z2(6^KbejVg0k~T?B;z!B3EQWMV_6IQgc@HRr$68r99B8UO%FTzMILF+465(2e+YW{GorNr(eY7EuqS5bA<S)Xg6!ZS"
    "FIxVNSR##$)A{j7xv-&Q2zlbcZL!C+6EKP%Has$I59>&SoaBGs<!Ru;@XlVwz=D9|<)OUX+Vl4Y6lDM$JMv{PWxE$FK(7?TC^hl_e8DOijrG5+wZ"
    "r054<6K-s=>P9q4Ki5ae6%iwKAuMm)s^-Hk7H$6K)IyShpKs39nysACAIy^Z#wJreQ0KWjUT>w3_7U&UjeifHS<-pj_Xtl?9VBYNfAf3vwu88?%H"
    "-)pVZg<SAiQGDyOu5*FAZ6>{HY62ywo}NEIKnS$EK)ynzKam=s7N;5h~>lmx(IU*xf#-z?q#G^$X#=L;2(X~>-#Dl;qXdL3Nye<Mi$2yX~t7yc%$"
    "(7U?_e?#Q*#BBF+wgvlhxZOuRp-H<NBh8dHUGX+@pirZx$%ul|ddm6z;6C#lE2;D)V=k`S8i6#$9=00682007_t69A-L000UP!b20Kl$*3o><PXh"
    "1+xraiU5vRC*Eeb#~VXY5hZ>1-W%DJFvr`^It7eF4w&6h(G2N2=LKWzQlU>Bw{+=@H-hzpDhlXtPuQXhkB$)5`O(4vVWO2m6#rTg9wo>CJv3ssgf"
    "<(8iMS!pXe_FRi}8x70Om}ENQJ%L8fT?jD)l{HTqKWKQCLy@JgU#BGg1|ia!O{RA>4^dZ@xHF&;Ye-X!Dbrfk`TAf(@2T))?-;o-J)=br*TXXo+)"
    "8@>7&aAx#oa_(3>&7Sn%=%I%|7mNK{@0y2cu(1`DkdQ%|9AwW;OOD|BUi+_^PwaJT^^kbaOY22dxhjypL7vgpv+}IOgc#D4<w~DcK>n=ukRRP>32"
    "#LTMov9nZ9HN-4UC(CtjAlp8pYf(QZmZKPd>=on)2%+Je|tuC!^Gw_m=<;zDqqXEU;7$Nwuu;=$*0kcAAWIUiYn>ypx6}ftH^2nE0g@NX0wJqJjt"
    ")g0<E%@fw|!?@da_9r{m7<82@`D?*?KM?<A(ePC!!Qw*TByIrXlfK%vz34mR2XJgB{NP9_vmVrI_y&%=f2<=}DE><A1!DVhad3mV(&h_VP#WHe)z"
    "|6|ZYJ-=j<TY;ExN9Jf5ozp%o$N7w=M57&Tg(mjq+wOSIH1s7x=0OOni6z(s=U5C@@CRjYHtj}&@-dcv5nDvGKo3p1gAa3TlE*7=4ntPN0|b30^h"
    "gp8hgu+FRXTR-DTg2y<CjkPLT0csbvvN-)06(%6P&WR(8%2{utOI_@W=y*Yd;$z2aLfd7twE^;e?Za%J57+Vk;BMQxisN^60SxQ(ztVeRz)8nhy!"
    "*g1ri7iyGL;#mZ==+_D@)0SptF&UFNkS8h=l403>$0$`KQm};GmpctIjS;&Pz2Rh%x<u@dCbW}AHlJWV<7^#V0rOtA(14ECfb!AJiYQHVy_|$Bl("
    "`+Rk)lXl(TRHKlx!eQmKQ9<=n~}Da#Hb<#t}Dvb{AVJ9xx;`O!Q9GA^z)Gb<SlyaD;pmBWXDgT5s=+W|7)+(z?PDs4W=?ws_1heT3f~uhVd;|!1F"
    "~hCZ5`JZW=(?&TMF+MSh>$8J1q-!g++CW1MwF5P&D&IoDH^q#_uWv?$?JQ&AskoNBP>ybP?$_DV(=SVOqCgGA~n6TA{?bjcb?ek17UAToTt8f|Ew"
    "yHZK~YU>bw0Z<9-8yz763&PR$c+|STX!Of<Tu^=sIC*iqMMR}b-QAk(9&nRIE}%v3S3R$yN*rV@`12~s`5&q};mL7o$OLQ34B@m<ZGR%POk9=gfE"
    "TjTj&XBJNzd<dgwZi$nwu4<1k6wMjSe!WB??@{btQ%d=A5tFDBZ@$4GwciuJ0{3?hZJW`I`1C)vq)mT&#zfO<&3E(WOCQB%Az|B8vT{9$~9PCK8d"
    "S#ZDm@!{-i#)WGC&79B*FVS6GZN}cT05V0dtE6Bo-6`d#M6zy_Ko`%-7(ga7H;xs5js65MIe7Y7o238B$-B}xt<AfJ@L0W~EB6=3;FZkCzSiH=Z@"
    "M3S`$$qbYO*ygdnzQaUZE#5SXA}r4xPAfbs7-W>y~KBL;2()It%yjGzW@Gr%tRC-+bL>K`@dH-i+8s!iSAG<C1<4~Vp@NxM`Pz~?@kTx)?0x)9<~"
    "hC?lc$A7{L7RdmX=|4*w!h9i^4C54d~Eis(;3ixaDb>Ah&J1|AADvw5qHQD`jZD8qTld2zetAc6>QrcGK)ES?+!0?YG~0W~(}6gFlOhhq*@k&VP@"
    "NISq6-2lb@DiNnytfyYm=*v+ryr6t!zgW<F5bC219|y<-j9@e~sUF3fE<3JGS?Vo%3eY>|eA0|eGo<|QWL9h(=pWF=&4+c(2ks#cH18_0zNp^+cc"
    "S}X!AHc*FP3S>9fW|KVvQNDC;(Wk3ZJ8<J85WprH?qNNiWzPA^dq6)yDkhj!Y0RSiE!hz#VS`Wd{evzfQGpKZQC~Hr8gd#cp{Z<E_hu9d~xhu;`x"
    "U;%0&k&gnP+mxUwTrouZn@0_zI4WZ<M^MClfAXX46daVTGdR@}9yo_7wpw0H^w6KBq*5VQYg>UU!$p_T48upk1D<iwsHpiQ3PA~wFG(p1i9ezc!t"
    "w!0o>EfQEh((lVi1>2ULfVN!Bh&k%lNs{ZY}hGnJ5oAAx=A4)|NC;@5ys5m8q=q|@EC!B4jk4z5IXe2fjH?1lgAi=HvzSAS9KJUmzkS=7a8f3Tqu"
    "OMAi*gZh)=3B&)Kb*(J(D#Wqo(xGA-hJV!|UXmfL-Bxcc+hPw9NPji*q+qyu%Hxz1--SDM1T(`F?A001`t007_sNdPZh00KEQ4$vvlGo@)-qSjjH"
    "Wt18Co=m*;jH2&KN-Of4&~M@Ejw-{~G{CY#S1P~&0E`SuN+Ul{e5rjjDGA@XN#Jh}_ZV!mh;#{!T0eMh=^X$704x9i0N?;Q03=-i00(jxA_MU{FG"
    ">jj@X^+8T(@%M=KQ`mHTz_X@1t4X7_u_}03vpU>fo-qTvTLpy9-$WrU3vo4wwnKs!q&{dtx<vRN5p^0TM0j?`-ZC$5&%EH#s&oIW{&nI5jslH#sp"
    "kH8?XsFCrB!B^Urf000120002s0D%BcT>t?C_DtiMCJMV#0-0OA^E1E6C!jhlsSy4#`X39=K(@OZEsD`;IXupes2z(RHNQNbU(QBut&iu}bvg}F*"
    "Cxhmp)9?H7!&CK9bklj007!HxvO-1#o<A2ngryME!gEx*5D(_rz2ahG$!A>Rm42!l5_lxbh`ik>dk-=k_14wtwV^GXxG7?k3!O;8t-Nq?=y(Dl+&"
    "@VL;j-rO5-nkkcV8tYy#)8TP`L8{MY+{osw>s%n|u!Nix0>O?6IEtn{;oR`D-SIrLpAXVTH(=-qihOtbG-2msEZmAq|P6@~#1Hp<~r1W$R6$5&!Y"
    "y@_)2$HgA%xvaR$8BvF_2Br"
)
VERSION_3_PARTS = "e4ead49bff34739a71de76bd2b1b9f079b9af5dcaffdfc81d94b957fd2eadc13"


def test_files_of_version_3_with_codes_of_8_bits_still_load():
    """Made when paths had codes of 8 bits: a predicted embedding, steps of columns, a grouped correction, floats."""
    _, stored = tg.unpack(VERSION_3)
    assert {n: (s.shape, s.trellis, s.columns is not None) for n, s in stored.items()} == {
        "tok_emb.weight": ((96, 24), 8, False), "blocks.0.attn.q.weight": ((16, 24), 8, True),
        "blocks.0.mlp.up.weight": ((20, 24), 8, True), "blocks.0.attn_scale": ((24,), 0, False),
    }  # fmt: skip
    assert stored["blocks.0.mlp.up.weight"].low_rank.group == 10
    parts = [part for s in stored.values() for part in tg.parts_of(s)]
    raw = b"".join((p if p.is_floating_point() else p.short()).numpy().tobytes() for p in parts)
    assert hashlib.sha256(raw).hexdigest() == VERSION_3_PARTS


def mixed(states: int = 8) -> dict[str, tg.QuantizedTensor]:
    """Tensors with everything that version 3 can hold."""
    named, store = weights()
    h = {"blocks.0.attn.q": second_moments(0.5, 48), "blocks.0.mlp.up": second_moments(1.0, 48)}
    cfg = tg.Config(quant_min_numel=100, quant_trellis=states, lqer_top_k=2, lqer_asym_enabled=True, lqer_asym_group=20,
                    gptq_enabled=True, mlp_bits=3, attn_bits=3)  # fmt: skip
    return tg.quantize(cfg, named, store, h)


@pytest.mark.parametrize("states", list(tg.TRELLISES))
def test_everything_of_version_3_comes_back_bit_for_bit(states):
    stored = mixed(states)
    assert {s.trellis for s in stored.values()} == {0, states} and any(s.columns is not None for s in stored.values())
    assert any(s.low_rank and s.low_rank.group for s in stored.values())
    _, found = tg.unpack(tg.pack(tg.Config(), {}, stored))
    for name, item in stored.items():
        assert torch.equal(tg.dequantize(item), tg.dequantize(found[name]))
        assert item.trellis == found[name].trellis
        for a, b in zip(tg.parts_of(item), tg.parts_of(found[name]), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype


def test_mutated_files_of_version_3_raise_artifact_errors_only():
    rng, blob = random.Random(11), tg.pack(tg.Config(), {"config": {}}, mixed())
    refused = 0
    for _ in range(200):
        try:
            tg.unpack(fuzz_one(rng, blob))
        except tg.ArtifactError:
            refused += 1
    assert refused > 50


def test_mutated_streams_of_paths_raise_artifact_errors_only():
    rng = random.Random(5)
    stream = tg.encode_paths([tg.trellis_codes(torch.randn(1, 60, 24) * 3, None, 8)[0].numpy()], 8, predictable=True)
    (count, packed) = tg.struct.unpack_from("<II", stream)
    fields = tg.from_bytes(tg.lzma_unpack(stream[8 : 8 + packed], 2 * count), torch.int16, [(count,)])[0].tolist()
    outcomes = set()
    for _ in range(300):
        edited, words = list(fields), bytearray(stream[8 + packed :])
        if rng.random() < 0.7:
            edited[rng.randrange(count)] = rng.choice([rng.randrange(-300, 300), rng.randrange(-32768, 32768)])
        else:
            words[rng.randrange(len(words))] ^= 1 << rng.randrange(8)
        try:
            (found,) = tg.decode_paths(tg.write_fields(edited) + bytes(words), [(60, 24)], 8)
            walk(found, 8)  # whatever loads is a path
            outcomes.add("loaded")
        except tg.ArtifactError as error:
            outcomes.add(str(error))
    assert "loaded" in outcomes and len(outcomes) > 4, outcomes


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ([7], "impossible trellis 7"),
        ([8, 2], "impossible coding"),
        ([8, 0, 3], "impossible group"),
        ([8, 1, -1], "impossible coding"),
        ([True], "impossible coding"),
        (["8"], "impossible coding"),
    ],
)
def test_impossible_lines_of_the_table_are_refused(rest, words):
    with pytest.raises(tg.ArtifactError, match=words):
        tg.parse_table([["a", "mlp", 8, [64, 32], 0, *rest]])


def test_a_trellis_of_few_rows_or_many_columns_is_refused():
    for shape in ([8, 4096], [16, 1 << 17]):
        with pytest.raises(tg.ArtifactError, match="impossible trellis"):
            tg.parse_table([["a", "mlp", 8, shape, 0, 8]])
        assert tg.trellis_states(tg.Config(quant_trellis=8), tuple(shape)) == 0


# ---- knobs, corrections, the last bytes


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"QUANT_TRELLIS": "6"}, "QUANT_TRELLIS"),
        ({"QUANT_TRELLIS": "8", "COMPRESSOR": "zstd"}, "needs COMPRESSOR=entropy"),
        ({"QUANT_TRELLIS": "4", "PRUNE_FRAC": "0.1", "PRUNE_SCOPE": "global"}, "PRUNE_SCOPE=tensor"),
        ({"AWQ_LITE_ENABLED": "1", "GPTQ_ENABLED": "0"}, "GPTQ_ENABLED=1"),
        ({"LQER_ENABLED": "2"}, "expected 0 or 1"),
    ],
)
def test_settings_that_cannot_work_get_one_clear_message(env, words):
    with pytest.raises(tg.ConfigError, match=words):
        tg.load_config({"RECIPE": "cpu", **env})


def test_published_names_of_the_corrections_are_ours():
    for env, top in (({}, 3), ({"LQER_TOP_K": "4"}, 4)):
        assert tg.load_config({"RECIPE": "cpu", "LQER_ENABLED": "1", **env}).cfg.lqer_top_k == top
    assert tg.load_config({"RECIPE": "cpu", "LQER_ENABLED": "0", "LQER_TOP_K": "4"}).cfg.lqer_top_k == 0


def test_asymmetric_factors_have_two_bits_left_and_a_step_a_group_right():
    residual = torch.randn(60, 3) @ torch.randn(3, 100) + 0.1 * torch.randn(60, 100)
    factors = tg.low_rank_codes(residual, 3, 4, 32)
    assert set(factors.left.unique().tolist()) <= {-2, -1, 0, 1} and factors.left_scale.shape == (1,)
    assert factors.right_scale.shape == (3, 4) and -8 <= factors.right.min() <= factors.right.max() <= 7
    assert float((residual - factors.product()).norm()) < 0.8 * float(residual.norm())


@pytest.mark.parametrize("states", [0, 8])
def test_awq_lite_refines_the_columns_that_count(states):
    named = {"b.0.weight": torch.randn(64, 96), "b.1.weight": torch.randn(64, 96)}
    x = torch.randn(500, 96)
    x[:, 32:48] *= 4
    hessians, store = {"b.0": x.T @ x, "b.1": torch.eye(96) * 500}, dict.fromkeys(named, "mlp")
    cfg = tg.Config(gptq_enabled=True, mlp_bits=4, quant_min_numel=0, quant_trellis=states)
    on = dataclasses.replace(cfg, awq_lite_enabled=True, awq_lite_group_size=16)
    plain, refined = tg.quantize(cfg, named, store, hessians), tg.quantize(on, named, store, hessians)
    before = 0 if states == 0 else plain["b.0.weight"].columns.int()
    moved = refined["b.0.weight"].columns.int() - before
    assert moved.tolist() == [8 * (states > 0) - 32 if 32 <= j < 48 else 0 for j in range(96)]
    assert (refined["b.1.weight"].columns is None) == (states == 0)
    error = lambda s: float(((e := tg.dequantize(s["b.0.weight"]) - named["b.0.weight"]) @ hessians["b.0"] * e).sum())  # noqa: E731
    assert error(refined) < (0.9 if states else 0.5) * error(plain)  # a trellis' columns cost the same already


def test_corrections_are_taken_only_where_they_save_more_than_their_bytes():
    """A rank-1 residual that matters is corrected, and columns with large inputs refined; white ones are not."""
    named, store, calibration = trained_stand_in()
    cfg = tg.Config(target_bytes=12_000, quant_min_numel=100, gptq_enabled=True, lqer_top_k=9, quant_trellis=8)
    search = tg.BudgetSearch(cfg, {}, named, store, calibration, 0, {})
    name = "blocks.1.mlp.up.weight"
    strong = torch.randn(192, 1) @ torch.randn(1, 48)
    step = 0.2
    factors = lambda r: tg.low_rank_codes(r, 1, 4, 16)  # noqa: E731
    assert search.correction_pays(name, factors(strong), strong, step)
    white = torch.randn(192, 48)
    assert not search.correction_pays(name, factors(white), white, step)
    assert not search.refining_pays(name, (torch.arange(48) < 16).to(torch.int8) * 16, step)
    search.cfg = dataclasses.replace(cfg, quant_trellis=0)  # columns have equal steps, and the last ones large inputs
    search.inputs = tg.Inputs(search.cfg, named, calibration.hessians)
    search.inputs.spreads[id(search.inputs.moments[name])] = tg.ErrorSpread(
        torch.eye(48), torch.where(torch.arange(48) < 4, 11.0, 1 / 11), 1.0
    )
    assert search.refining_pays(name, (torch.arange(48) < 4).to(torch.int8) * 16, step)


@pytest.mark.parametrize("states", [0, 8])
def test_the_last_bytes_are_spent(states, monkeypatch):
    """At most LEFT_BYTES are left where the first files leave far more."""
    g = torch.Generator().manual_seed(4)
    named = {f"blocks.{i}.mlp.up.weight": torch.randn(256, 128, generator=g) * 0.02 for i in range(4)}
    store = dict.fromkeys(named, "mlp")
    fisher = {n: torch.full((256,), 4.0**i) for i, n in enumerate(named)}
    monkeypatch.setattr(tg, "BUDGET_FLOOR", 0.9)
    monkeypatch.setattr(tg, "BUDGET_AIM", 0.94)
    monkeypatch.setattr(tg, "LEFT_BYTES", 300)
    cfg = tg.Config(target_bytes=60_000, quant_trellis=states)
    budget = tg.fill_budget(cfg, {}, named, store, tg.Calibration({}, fisher), 0)
    assert 0 <= cfg.target_bytes - budget.spent <= 300
    assert len(tg.pack(cfg, {}, budget.stored)) == len(budget.blob) == budget.spent
