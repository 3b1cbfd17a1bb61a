from guided_diffusion.commands.replay import run

if __name__ == "__main__":
    run()
