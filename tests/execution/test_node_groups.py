"""The groups of an autoscaler's file, and how they are told."""

from m2mkd_ray.execution.node_groups import NodeGroup, groups_of

FILE = {
    "max_workers": 6,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "incubate": {"resources": {"CPU": 8, "GPU": 4}, "max_workers": 20},
        "finetune": {"resources": {"CPU": 96, "GPU": 8, "memory": 5e11}, "max_workers": 2},
        "cpu": {"resources": {"CPU": 16}},
        "off": {"resources": {"CPU": 1}, "max_workers": 0},
        "unknown": {},
    },
}


def test_groups_have_as_many_nodes_as_their_file_allows() -> None:
    most = {group.name: group.most for group in groups_of(FILE)}
    assert most == {"incubate": 6, "finetune": 2, "cpu": 6, "off": 0, "unknown": 6}


def test_without_a_file_there_are_no_groups() -> None:
    assert groups_of({}) == []


def test_a_group_is_told_with_what_its_nodes_have() -> None:
    texts = [str(group) for group in groups_of(FILE)]
    assert texts[:3] == [
        "incubate (8 CPUs, 4 GPUs, up to 6 nodes)",
        "finetune (96 CPUs, 8 GPUs, 500 GB of memory, up to 2 nodes)",
        "cpu (16 CPUs, up to 6 nodes)",
    ]
    assert str(NodeGroup("one", {"CPU": 1}, 1)) == "one (1 CPU, up to 1 node)"
