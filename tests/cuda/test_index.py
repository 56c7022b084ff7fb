from cuda_testing import HERE, ROOT, compiler, run


def test_index_functions(tmp_path):
    """Masks against asking every pair; swizzle and fragments against NVIDIA's tables."""
    program = tmp_path / "index_test"
    run(compiler(), "-std=c++17", "-O1", "-Wall", f"-I{ROOT / 'csrc'}", HERE / "index_test.cpp", "-o", program)
    run(program)
