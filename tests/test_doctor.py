"""The doctor: finds what is there, and what is broken."""

import torch

import csfast
from csfast import doctor, models, ops


def by_subject(findings):
    return {finding.subject: finding for finding in findings}


def test_a_sound_machine_has_no_fault():
    findings = by_subject(doctor.examine())
    assert not [f for f in findings.values() if f.is_fault]
    assert findings["csfast"].text == csfast.__version__
    assert findings["torch"].text.startswith(torch.__version__)
    assert ops.isa() in findings["kernels"].text


def test_wrong_kernels_are_a_fault(monkeypatch):
    execute = ops.execute
    monkeypatch.setattr(ops, "execute", lambda *args, **options: execute(*args, **options) + 1)
    finding = by_subject(doctor.examine())["kernels"]
    assert finding.is_fault
    assert "differ from the reference" in finding.text


def test_a_missing_demo_model_is_a_fault(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "demo_folder", lambda: tmp_path)
    finding = by_subject(doctor.examine())["demo model"]
    assert finding.is_fault and "missing" in finding.text


def test_the_head_of_results_names_the_machine():
    found = doctor.machine(torch.device("cpu"))
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["isa"] == ops.isa()
    assert found["cpu"]
