from guided_diffusion.commands.evaluate import run

if __name__ == "__main__":
    run()
