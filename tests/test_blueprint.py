import pytest

from m2mkd_ray.blueprint import Blueprint, ModulePair, Moe, Nac, Prior, Student, Vit

SIZE = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 4, "num_classes": 10, "num_heads": 4}
TEACHER = Vit(width=64, depth=12, **SIZE)
STUDENT = Student(vit=Vit(width=48, depth=8, **SIZE), moe=Moe(num_experts=4))


def blueprint(**changes: object) -> Blueprint:
    settings = {"teacher": TEACHER, "teacher_depths": (3, 4, 5), "student": STUDENT, "student_depths": (2, 2, 4)}
    return Blueprint.model_validate({**settings, **changes})


def test_pairs_are_the_blocks_one_after_another() -> None:
    assert blueprint().pairs == (
        ModulePair(index=0, teacher_blocks=(0, 3), student_blocks=(0, 2)),
        ModulePair(index=1, teacher_blocks=(3, 7), student_blocks=(2, 4)),
        ModulePair(index=2, teacher_blocks=(7, 12), student_blocks=(4, 8)),
    )


def test_the_meta_model_is_the_teacher_with_one_block_a_module() -> None:
    assert blueprint().meta == Vit(width=64, depth=3, **SIZE)
    assert blueprint().num_modules == 3


def test_depths_left_to_timm_are_not_compared_here() -> None:
    large = Vit(name="vit_large_patch16_224", img_size=32, num_classes=10)
    assert blueprint(teacher=large, teacher_depths=(6, 9, 9)).meta.depth == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_depths": (3, 4, 4)}, r"teacher_depths \(3, 4, 4\) add up to 11 blocks, but teacher has depth 12"),
        ({"student_depths": (1, 2, 4)}, r"student_depths \(1, 2, 4\) add up to 7 blocks, but student has depth 8"),
        ({"student_depths": (4, 4)}, r"teacher_depths \(3, 4, 5\) make 3 modules, but student_depths \(4, 4\) make 2"),
        ({"teacher_depths": (12,), "student_depths": (8,)}, r"at least two modules are needed"),
        ({"teacher_depths": (0, 7, 5)}, r"every module needs at least one block"),
        ({"teacher": TEACHER.model_copy(update={"img_size": 64})}, r"teacher has img_size 64, but student has 32"),
        ({"teacher": TEACHER.model_copy(update={"num_classes": 9})}, r"teacher has num_classes 9, but student has 10"),
        ({"teacher": {"width": 65, "num_heads": 4}}, r"width 65 is not a multiple of num_heads 4"),
        ({"teacher": {"img_size": 30, "patch_size": 4}}, r"img_size 30 is not a multiple of patch_size 4"),
        ({"student": {"vit": SIZE, "moe": {"num_experts": 2, "top_k": 3}}}, r"top_k 3 is more than num_experts 2"),
        ({"student": {"vit": SIZE, "mlp": {}}}, r"Extra inputs are not permitted"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_numbers(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blueprint(**changes)


def test_all_problems_are_in_one_message() -> None:
    with pytest.raises(ValueError, match=r"add up to 11 .*; student_depths \(1, 1\) add up to 2 .*; .* make 2"):
        blueprint(teacher_depths=(3, 4, 4), student_depths=(1, 1))


NAC = Nac(img_size=32, num_classes=10)


def test_a_circuit_has_one_layer_a_module() -> None:
    circuit = Student(family="nac", nac=NAC)
    assert blueprint(student=circuit, student_depths=(1, 1, 1)).student.sizes is NAC
    for depths in ((2, 2, 4), (1, 1, 2)):
        with pytest.raises(ValueError, match=r"student_depths must be three or more ones, but is \(\d"):
            blueprint(student=circuit, student_depths=depths)
    with pytest.raises(ValueError, match="three or more ones"):
        blueprint(teacher_depths=(6, 6), student=circuit, student_depths=(1, 1))


def test_a_circuit_has_the_teachers_images_and_classes() -> None:
    other = Student(family="nac", nac=Nac(img_size=64, num_classes=5))
    with pytest.raises(ValueError, match=r"img_size 32, but student has 64; .* num_classes 10, but student has 5"):
        blueprint(student=other, student_depths=(1, 1, 1))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"family": "nac"}, "`nac` is needed by family=nac, and only by it; family is nac"),
        ({"family": "vmoe", "nac": NAC}, "`nac` is needed by family=nac, and only by it; family is vmoe"),
        ({"family": "nac", "nac": NAC, "vit": TEACHER}, "`vit` is needed by every family but nac"),
        ({"family": "vmoe"}, "`vit` is needed by every family but nac"),
        ({"family": "nac", "nac": NAC, "moe": {"top_k": 1}}, "`moe` changes nothing for family=nac, .* leave it out"),
    ],
)
def test_a_student_has_the_sizes_of_its_family_alone(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Student.model_validate(sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"img_size": 60, "width": 382}, "img_size 60 is not a multiple of 8.*; width 382 is not a multiple of 4"),
        ({"prior": Prior(kind="ring_of_cliques", num_groups=7)}, "num_groups 7 does not divide num_mediators 256"),
        (
            {"num_mediators": 8, "prior": Prior(kind="ring_of_cliques", num_groups=8)},
            "num_groups 8 leaves each clique of num_mediators 8 one node, but a clique has two or more",
        ),
        ({"num_mediators": 2}, "new_edges 2 is not less than num_mediators 2"),
    ],
)
def test_sizes_of_a_circuit_that_do_not_fit_are_refused(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Nac.model_validate({"num_classes": 10, **sizes})


def test_other_students_are_dumped_as_before_there_were_circuits() -> None:
    assert set(STUDENT.model_dump()) == {"family", "vit", "moe"}


def test_a_circuit_is_dumped_without_mixtures_and_read_with_them() -> None:
    circuit = Student(family="nac", nac=NAC)
    assert set(circuit.model_dump()) == {"family", "vit", "nac"}
    assert Student.model_validate_json(circuit.model_dump_json()) == circuit
    assert Student.model_validate({"family": "nac", "nac": NAC, "moe": {"num_experts": 8}}) == circuit
