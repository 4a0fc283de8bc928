def pytest_addoption(parser):
    parser.addoption(
        "--renew-golden",
        action="store_true",
        help="write tests/golden anew instead of comparing: pytest tests/recipes/test_golden.py --renew-golden",
    )
