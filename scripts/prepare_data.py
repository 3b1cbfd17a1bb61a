from guided_diffusion.commands.prepare import run

if __name__ == "__main__":
    run()
