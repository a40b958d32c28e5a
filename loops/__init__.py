"""What is done: pure decisions and native work; knows no process, socket or database."""
